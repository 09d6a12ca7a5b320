"""The delta's own view of a chat: the one renderer for serving, training and evaluation.

A delta never reads the user LLM's chat template, nor the chat template of its own tokenizer, which is the template
LLM's. It reads its manifest's template or else the built-in default, so that it sees the same prompt beside any LLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.errors import DeltaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>\n' + message.content }}"
    "{% if not (loop.last and continue_final_message) %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


class Message(TypedDict):
    """One turn of a chat, reduced to text."""

    role: str
    content: str


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Chat messages as OpenAI clients send them, reduced to role and text.

    Text parts are joined with a newline, null is the empty text, and everything that is not text is left out.
    """
    return [
        Message(role=str(message.get("role", "user")), content=_text(message.get("content"))) for message in messages
    ]


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = (
            part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, (str, Mapping))
        )
        return "\n".join(text for text in texts if isinstance(text, str))
    return ""


def compile_template(source: str) -> jinja2.Template:
    """Compile a prompt template in Jinja's sandbox.

    Raises:
        ValueError: the template is not valid Jinja.
    """
    # Block trimming as Hugging Face's chat templates have it, so that their habits carry over.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the prompt template is not valid Jinja ({error})") from None


class PromptEncoder:
    """Turns chats and plain texts into the ids that one delta reads.

    Args:
        tokenizer: the delta's fast tokenizer.
        manifest: the delta's manifest.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, manifest: DeltaManifest) -> None:
        self._tokenizer = tokenizer
        self._template = compile_template(manifest.prompt_template or DEFAULT_TEMPLATE)
        self.bos_ids = bos_ids(tokenizer, manifest)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a chat.

        Raises:
            DeltaError: the manifest's template fails on these messages.
        """
        try:
            return self._template.render(
                messages=plain_messages(messages),
                continue_final_message=continue_final_message,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise DeltaError(f"The delta's prompt template cannot render these messages: {error}.") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered prompt: bos once if the delta reads one, never eos."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if ids[: len(self.bos_ids)] == self.bos_ids else self.bos_ids + ids

    def encode_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Render and encode in one call; see :meth:`render` and :meth:`encode`."""
        text = self.render(
            messages, continue_final_message=continue_final_message, add_generation_prompt=add_generation_prompt
        )
        return self.encode(text)


def bos_ids(tokenizer: PreTrainedTokenizerBase, manifest: DeltaManifest) -> list[int]:
    """The bos token as a list of one id, or an empty list: as the manifest says, else as the tokenizer does.

    Raises:
        DeltaError: the manifest asks for a bos that the tokenizer does not have.
    """
    bos: int | None = tokenizer.bos_token_id
    if manifest.bos is None:
        return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    if manifest.bos and bos is None:
        raise DeltaError("The manifest says bos: true, but the delta's tokenizer has no bos token.")
    return [bos] if manifest.bos and bos is not None else []
