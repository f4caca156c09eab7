"""What a key is: one of ours, one of verl's or of another library that is answered by name, or a misspelt one with its
nearest neighbour."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from steepest.config.foreign_names import Foreign, foreign
from steepest.config.tree import Leaf
from steepest.config.verl_keys import Refusal, find


@dataclass(frozen=True)
class KeyBook:
    """All keys of one job and the answers for those it does not have."""

    leaves: Mapping[str, Leaf]
    refused: Mapping[str, Refusal]
    no_effect: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def leaf_of(self, key: str) -> tuple[Leaf | None, bool]:
        """The leaf that `key` is, or is inside of (an entry of a mapping such as override_config), else None."""
        if key in self.leaves:
            return self.leaves[key], False
        parts = key.split(".")
        for i in range(len(parts) - 1, 0, -1):
            leaf = self.leaves.get(".".join(parts[:i]))
            if leaf is not None and leaf.base is dict:
                return leaf, True
        return None, False

    def true_name(self, key: str) -> str:
        """The key that `key`, or the section or mapping that it is in, is a second name of; any other key as it is."""
        parts = key.split(".")
        for i in range(len(parts), 0, -1):
            if name := self.aliases.get(".".join(parts[:i])):
                return ".".join([name, *parts[i:]])
        return key

    def is_ignored(self, key: str) -> bool:
        """Accepted without a field of its own, whatever its value."""
        return key in self.no_effect

    def without_effect(self, key: str, value: object) -> str | None:
        """Why a key that is not one of ours is accepted and changes nothing; None when it asks for what is so anyway,
        and when it is not accepted."""
        if self.is_ignored(key):
            return self.no_effect[key]
        name = find(dict(self.refused), key)
        if name is None or not self.refused[name].harmless or self.refused[name].accepts(value):
            return None
        return self.refused[name].reason

    def problem_of(self, key: str, value: object) -> str | None:
        """Why a key that is not one of ours cannot be given; None when it may be."""
        if self.is_ignored(key):
            return None
        name = find(dict(self.refused), key)
        if name is None:
            return self.unknown(key)
        refusal = self.refused[name]
        if refusal.harmless or refusal.accepts(value):
            return None
        if refusal.agrees and name == key:
            return f"{key}={_text(value)}: {_only(refusal)}. {refusal.reason}"
        return f"{key}: verl has this key, Steepest has not. {refusal.reason}"

    def unknown(self, key: str) -> str | None:
        """The answer to a key that neither Steepest nor verl has; None when one of them has it."""
        if self.is_ignored(key) or find(dict(self.refused), key) is not None:
            return None
        if "@" in key:
            return (
                f"{key}: a choice of verl's configuration groups. Steepest has one form of each section: leave it out, "
                "and set the section's keys."
            )
        guess, other = self.suggest(key), self._foreign(key)
        if other is not None and guess is None and (sentence := other.sentence()):
            return f"{key}: no such key. {sentence}"
        if other is not None and guess is not None and guess == self._key_of_other_library(key):
            return f"{key}: no such key. Here it is {guess}" + (f" ({other.note})." if other.note else ".")
        return f"{key}: no such key." + (f" Did you mean {guess}?" if guess else " --help-all lists all keys.")

    def _foreign(self, key: str) -> Foreign | None:
        """What another library's setting corresponds to. A name that is ours too, written in a section, is one whose
        section is misspelt."""
        section, _, name = key.rpartition(".")
        return None if section and any(k.endswith(f".{name}") for k in self.leaves) else foreign(key)

    def _key_of_other_library(self, key: str) -> str | None:
        """Our key for a setting of another library; the critic's for one that is written in its section."""
        other = self._foreign(key)
        found = other.key(self.leaves) if other is not None else None
        if found is not None and key.startswith("critic."):
            for section in ("actor_rollout_ref.actor.", "actor_rollout_ref."):
                critics = f"critic.{found.removeprefix(section)}"
                if found.startswith(section) and critics in self.leaves:
                    return critics
        return found

    def suggest(self, key: str) -> str | None:
        """The known key that `key` stands for: by its name in another library, else one with the same ending (a
        forgotten section), else the most similar by name and section."""
        if self._foreign(key) is not None:
            return self._key_of_other_library(key)
        known = list(self.leaves)
        same_end = [k for k in known if k.endswith(f".{key}")]
        if same_end:
            return same_end[0]
        section, _, name = key.rpartition(".")

        def likeness(other: str) -> float:
            other_section, _, other_name = other.rpartition(".")
            names = difflib.SequenceMatcher(None, name, other_name).ratio()
            return names + difflib.SequenceMatcher(None, section, other_section).ratio()

        best = max(known, key=likeness)
        return best if likeness(best) > 1.4 else None


def _only(refusal: Refusal) -> str:
    """`must be 1`, `must be fsdp or fsdp2`."""
    values = [_text(v) for v in refusal.agrees if v is not None][:4]
    return "must be " + (" or ".join(values) if values else "null")


def _text(value: object) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return "null" if value is None else str(value)
