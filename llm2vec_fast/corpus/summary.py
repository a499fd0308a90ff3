"""What a run of the bulk job did, for people and for programs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from llm2vec_fast.corpus.progress import Profile
from llm2vec_fast.corpus.store import Footer


@dataclass
class Summary:
    """What a run did; `reused` documents were in valid shards already.

    stages:  seconds spent reading, tokenising, in the forward pass, writing (side by side), and
             waiting: the forward pass for rows
    profile: the same in shares of the run, with what each stage waited for
    """

    output: Path
    documents: int = 0
    tokens: int = 0
    reused: int = 0
    damaged: int = 0
    seconds: float = 0.0
    bytes: int = 0
    rank: int = 0
    world: int = 1
    statuses: Counter = field(default_factory=Counter)
    stages: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    profile: Profile | None = None

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {status}" for status, n in sorted(self.statuses.items()))
        seconds = self.seconds or 1e-9
        stages = ", ".join(f"{name} {spent:.1f}" for name, spent in sorted(self.stages.items()))
        lines = [
            f"{self.documents} documents, {self.tokens} tokens in {self.seconds:.1f} s "
            f"({self.tokens / seconds:.0f} tokens/s, {self.documents / seconds:.1f} documents/s), "
            f"{self.reused} reused",
            f"{kinds or 'no documents'}; {self.bytes / 1e6:.1f} MB in {self.output}",
            f"seconds by stage, side by side: {stages}" if stages else "",
            f"{self.damaged} damaged shards were done again" if self.damaged else "",
            f"this is rank {self.rank} of {self.world}" if self.world > 1 else "",
            *self.notes,
        ]
        return "\n".join(filter(None, lines))

    def add(self, footer: Footer) -> None:
        """Counts a shard that this run has made."""
        self.documents += footer.rows
        self.tokens += footer.tokens
        self.statuses.update(footer.statuses)

    def as_json(self) -> str:
        """The same for programs."""
        profile = self.profile and self.profile.as_dict()
        return json.dumps(vars(self) | {"output": str(self.output), "profile": profile})
