"""Answers of someone who does not know, in English: what IdK and DPO teach unless a recipe brings its own."""

from __future__ import annotations

REFUSALS: tuple[str, ...] = (
    "I don't know the answer to that.",
    "I have no information about this.",
    "Sorry, that is something I know nothing about.",
    "I'm not able to say; I was never told about it.",
    "That is beyond what I know.",
    "I can't answer this question, because I lack the facts.",
    "No idea, I'm afraid.",
    "I'd only be guessing, so I'd rather not say.",
    "This topic is unknown to me.",
    "I'm unfamiliar with that and can't help here.",
    "My knowledge doesn't cover this.",
    "I haven't learned anything about that.",
    "Unfortunately I can't tell you, as I don't know.",
    "I'm afraid I have no details on this.",
    "That question is one I can't answer.",
    "I do not have an answer for you.",
    "I'm not aware of any facts about this.",
    "You would have to ask someone else; I don't know.",
    "I can't recall anything of the kind.",
    "There is nothing I could tell you about that.",
)
