"""The conversation that the demo plays: each turn's prompt extends the one before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["TURNS_MAX", "USER_TEXTS", "Conversation"]

_SYSTEM_TEXT: Final = (
    "You look after the greenhouse line of Tamarind & Wren, makers of small indoor gardens. "
    "Answer in two sentences, name the part to look at, and never guess a part number. The Fern "
    "has one lamp bar and one tank, the Heron two lamp bars and a pump, the Otter a pump, a mist "
    "ring and a hatch. A blinking amber ring: the tank sensor is dry. A steady amber ring: the "
    "pump was stopped by hand. A white ring is the night mode and no fault."
)

USER_TEXTS: Final = (
    (
        "Good morning. I was given a Heron last week and built it on the kitchen shelf. The left "
        "lamp bar is bright, the right one flickers for a minute whenever the pump starts, and "
        "then it is calm again. I have basil, two lettuces and a strawberry in it, all of them "
        "happy so far. Is the flicker a sign that the bar is about to fail, or is the shelf "
        "socket simply too weak?"
    ),
    (
        "I moved it to the wall socket as you said and the flicker is gone, thank you. Now the "
        "ring is amber. It is not blinking, it just stays amber all day, while the tank is full "
        "to the upper mark. My daughter likes the button under the lid and may have held it down. "
        "How do I find out whether the pump is stopped, and does the basil suffer if it stood "
        "still overnight?"
    ),
    (
        "The pump runs again. While I had the lid open I saw a white crust along the intake, "
        "about a finger wide, and the strawberry's pot is damp on the outside. Our tap water is "
        "very hard. May I use vinegar on the intake, how long should it stay there, and must the "
        "plants come out first? I would rather not take the lettuces apart, their roots have "
        "grown into each other."
    ),
    (
        "Vinegar worked and everything is back in place. My neighbour saw the garden and wants "
        "one for a windowless bathroom with a lot of steam. She thinks of the Otter because of "
        "the mist ring, I think that the Fern would do. She travels for ten days each month. "
        "Which of the two needs less care, and would the hatch of the Otter hold when nobody tops "
        "the tank up?"
    ),
    (
        "One last thing, and it is a little urgent. I filled the tank too quickly and some water "
        "ran down behind the shelf, where the cable goes. The ring is white now and both lamp "
        "bars are off, although it is eleven in the morning. The floor is dry. Please sum up what "
        "you told me about the ring, the intake and the sockets, in the order in which I should "
        "check them now."
    ),
)
"""What the customer says, turn by turn."""

TURNS_MAX: Final = len(USER_TEXTS)
"""Turns of the whole conversation."""


class Conversation:
    """A growing list of token ids, rendered piece by piece as the model's chat template does."""

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self._encode = encode
        self._token_ids = list(encode(f"<s><|system|>{_SYSTEM_TEXT}<|end|>"))

    def ask(self, text: str) -> list[int]:
        """Append a user's message; return the prompt that asks the model for its answer."""
        self._token_ids.extend(self._encode(f"<|user|>{text}<|end|><|assistant|>"))
        return list(self._token_ids)

    def hear(self, answer: Sequence[int]) -> None:
        """Append the model's answer to the last prompt."""
        self._token_ids.extend(answer)
        self._token_ids.extend(self._encode("<|end|>"))
