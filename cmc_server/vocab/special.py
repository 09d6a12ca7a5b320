"""Special tokens: their roles, how they pair between two vocabularies, and the file that says otherwise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from cmc_server.errors import MapError

if TYPE_CHECKING:
    from cmc_server.vocab.surface import Vocabulary

#: User token content to delta token content; None leaves the user token unmapped.
Overrides = Mapping[str, str | None]

#: Tokens that end a turn under any tokenizer that has them, whatever its settings say.
END_CONTENTS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


class SpecialRoles(NamedTuple):
    """The special tokens of a vocabulary: all of them, and those with a role (see ``Vocabulary``)."""

    special_ids: frozenset[int]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    unk_id: int | None
    pad_id: int | None


def find_roles(
    contents: Sequence[str | None],
    added: Mapping[int, Any],
    byte_ids: Mapping[int, int],
    tokenizer: Any,
    generation_config: Mapping[str, Any] | None,
) -> SpecialRoles:
    """The special tokens of a tokenizer and their roles.

    An end that only the generation config names counts where it is an added token with visible text: some configs
    list a newline, and a newline must stay text.

    Args:
        contents: token contents by id.
        added: the backend's added tokens by id.
        byte_ids: byte value to id of the byte tokens, which are text even where a conversion flagged them special.
        tokenizer: the transformers tokenizer that knows the roles.
        generation_config: content of ``generation_config.json`` or None.

    Raises:
        MapError: ``eos_token_id`` of the generation config is neither an id nor a list of ids.
    """

    def known(token: int | None) -> int | None:
        return token if token is not None and 0 <= token < len(contents) and contents[token] is not None else None

    special = {token for token, added_token in added.items() if added_token.special}
    special |= {token for token in tokenizer.all_special_ids if known(token) is not None}
    special -= set(byte_ids.values())
    ends = [known(tokenizer.eos_token_id)]
    for token in _configured_ends(generation_config):
        if token in special or (token in added and added[token].content.strip()):
            ends.append(token)
    named = set(END_CONTENTS).intersection(content for content in contents if content is not None)
    ends += [contents.index(content) for content in END_CONTENTS if content in named]
    eos_ids = tuple(dict.fromkeys(token for token in ends if token is not None))
    return SpecialRoles(
        special_ids=frozenset(special.union(eos_ids)),
        bos_id=known(tokenizer.bos_token_id),
        eos_ids=eos_ids,
        unk_id=known(tokenizer.unk_token_id),
        pad_id=known(tokenizer.pad_token_id),
    )


def _configured_ends(generation_config: Mapping[str, Any] | None) -> list[int]:
    value = (generation_config or {}).get("eos_token_id")
    ends = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) for token in ends):
        raise MapError(f"eos_token_id in generation_config.json must be an id or a list of ids, not {value!r}.")
    return ends


def pair_special(user: Vocabulary, delta: Vocabulary) -> dict[int, int]:
    """Delta token of each user special token that has one.

    In this order: equal content among the special tokens of both sides (``<s>`` is bos in one vocabulary and an HTML
    tag in another), bos, eos, unk, and pad where the delta's pad has no other role.
    """
    delta_special = {delta.contents[token]: token for token in sorted(delta.special_ids, reverse=True)}
    pairs = {
        token: delta_special[user.contents[token]]
        for token in sorted(user.special_ids)
        if user.contents[token] in delta_special
    }
    delta_eos = delta.eos_ids[0] if delta.eos_ids else None
    has_own_pad = delta.pad_id not in (delta.bos_id, delta.unk_id, *delta.eos_ids)
    by_role = [
        (user.bos_id, delta.bos_id),
        *((end, delta_eos) for end in user.eos_ids),
        (user.unk_id, delta.unk_id),
        (user.pad_id, delta.pad_id if has_own_pad else None),
    ]
    for user_token, delta_token in by_role:
        if user_token is not None and delta_token is not None:
            pairs.setdefault(user_token, delta_token)
    return pairs


def read_overrides(path: Path) -> dict[str, str | None]:
    """Read an overrides file: JSON or YAML, one object of user token to delta token or null.

    Raises:
        MapError: the file cannot be read or is not such an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MapError(f"The overrides file {path} cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise MapError(f"The overrides file {path} must hold one object of user token to delta token or null.")
    for key, value in values.items():
        if not isinstance(key, str) or not (value is None or isinstance(value, str)):
            raise MapError(f"In the overrides file {path}, {key!r}: {value!r} must be quoted text to text or null.")
    return values


def resolve_overrides(overrides: Overrides, user: Vocabulary, delta: Vocabulary) -> dict[int, int]:
    """Overrides by contents as overrides by ids; -1 where the user token is to be unmapped.

    Raises:
        MapError: a token does not exist in its vocabulary; all such tokens are named.
    """
    unknown = [f"{key!r} (user)" for key in overrides if key not in user.ids_by_content]
    wanted = [value for value in overrides.values() if value is not None]
    unknown += [f"{value!r} (delta)" for value in wanted if value not in delta.ids_by_content]
    if unknown:
        raise MapError(f"The overrides name tokens that do not exist: {', '.join(unknown)}.")
    return {
        user.ids_by_content[key]: -1 if value is None else delta.ids_by_content[value]
        for key, value in overrides.items()
    }
