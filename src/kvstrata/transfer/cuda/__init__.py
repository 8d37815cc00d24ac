"""What device copies need of CUDA, behind a protocol: importable without a GPU, driver or torch."""
