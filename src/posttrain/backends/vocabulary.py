"""Which token ids a model may say, and whether two models mean the same by them.

The output layer of a published checkpoint is often padded to a round number of rows, and its
tokenizer may have fewer tokens, more, or gaps between them. What may be drawn are the ids that the
tokenizer has a token for and the model a row: everything else has probability 0, in sampling and
in every loss.

Two models are compared by what matters: that an id which both use stands for one token. Rows beyond
the tokens, stop tokens and chat templates may differ. Plain data in, so that a plan can compare
files without torch or transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from posttrain.engine.errors import ConfigError


@dataclass(frozen=True)
class TokenIds:
    """The ids that may be drawn: those below `size` that are not in `holes`."""

    size: int
    """One more than the last of them."""
    holes: frozenset[int] = frozenset()

    def __contains__(self, token: object) -> bool:
        return isinstance(token, int) and 0 <= token < self.size and token not in self.holes

    def __len__(self) -> int:
        return self.size - len(self.holes)

    def __iter__(self) -> Iterator[int]:
        return (token for token in range(self.size) if token not in self.holes)

    def without(self, ids: Collection[int]) -> TokenIds:
        """Those that are left when `ids` are no longer drawn."""
        return drawable(set(self).difference(ids), self.size)


def drawable(ids: Collection[int], rows: int) -> TokenIds:
    """The ids among `ids`, those of the tokenizer's tokens, that a model of so many rows has.

    Raises ConfigError where there is none.
    """
    usable = {token for token in ids if 0 <= token < rows}
    if not usable:
        raise ConfigError(
            f"none of the tokenizer's {len(ids)} token ids is among the {rows} rows of the model; "
            "put the tokenizer that the model was trained with beside its weights"
        )
    size = max(usable) + 1
    return TokenIds(size, frozenset(range(size)) - usable if len(usable) < size else frozenset())


class Text(Protocol):
    """As much of a `Chat` as is compared."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def ids(self) -> TokenIds: ...

    def refuse(self, unknown: Collection[int]) -> None: ...


class Speaker(Protocol):
    """As much of a learner or scorer as is compared."""

    @property
    def chat(self) -> Text: ...

    def restrict(self, absent: Collection[int]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A token with another id, or an id with another token, in a second vocabulary."""

    token: str
    ours: int | None
    theirs: int | None

    def said(self, theirs: str, ours: str) -> str:
        """In words; the arguments are what the two places are called, `in FILE` or `here`."""
        ids = ("no id" if one is None else f"id {one}" for one in (self.theirs, self.ours))
        return f"token {self.token!r} has {next(ids)} {theirs} and {next(ids)} {ours}"


def difference(
    ours: Mapping[str, int],
    theirs: Mapping[str, int],
    *,
    our_added: Collection[str] = (),
    their_added: Collection[str] = (),
) -> Difference | None:
    """The first token by which two vocabularies differ, None where they mean the same.

    An added token that the other has no token in place of is no difference: no text that both read
    has it, and `Chat` refuses the text that does.
    """
    if ours == theirs:
        return None
    our_ids, their_ids = set(ours.values()), set(theirs.values())
    for token in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(token), theirs.get(token)
        more = (mine is None and token in their_added and other not in our_ids) or (
            other is None and token in our_added and mine not in their_ids
        )
        if mine != other and not more:
            return Difference(token=token, ours=mine, theirs=other)
    return None


def tokenizer_difference(ours: Any, theirs: Any) -> Difference | None:
    """As `difference`, of two transformers tokenizers."""
    return difference(
        ours.get_vocab(),
        theirs.get_vocab(),
        our_added=ours.get_added_vocab(),
        their_added=theirs.get_added_vocab(),
    )


def check_same_tokens(ours: Text, theirs: Text, name: str, *, role: str = "teacher") -> None:
    """Raise ConfigError unless two models mean the same by every token id that both use.

    `name` and `role` are what the message calls the second.
    """
    found = tokenizer_difference(ours.tokenizer, theirs.tokenizer)
    if found is not None:
        raise ConfigError(
            f"{role} {name!r}: its vocabulary differs from the student's: "
            f"{found.said('there', 'here')}; a {role} must come from the same tokenizer, best from "
            "the same checkpoint as the student"
        )


def draw_alike(
    policy: Speaker, others: Sequence[Speaker], *, own_text: Collection[Speaker] = ()
) -> None:
    """Let the policy and the models that read its tokens give probability to the same ids: those
    that all of them have a token for. Nothing where these are the same already.

    Text of the policy is refused where it has a token that a reader lacks. The models of `own_text`
    read prompts of their own, in which each of them may have its own tokens, as a thinking model
    has those of its template.
    """
    if all(other.chat.ids == policy.chat.ids for other in others):
        return
    ours = set(policy.chat.ids)
    common = ours.intersection(*(other.chat.ids for other in others))
    readers = [other for other in others if not any(other is own for own in own_text)]
    unknown = ours - ours.intersection(*(other.chat.ids for other in readers))
    if unknown:
        policy.chat.refuse(unknown)
    for model in (policy, *others):
        absent = set(model.chat.ids) - common
        if absent:
            model.restrict(absent)
