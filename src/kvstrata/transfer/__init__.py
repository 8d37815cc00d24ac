"""Moving bytes: the pure planner, the backend seam, the executor. Decides nothing."""
