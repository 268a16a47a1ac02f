"""Calibration sets on the Hugging Face hub and on ModelScope, described as data."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ar_tuner.calibration.optional import check_installed, load
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ar_tuner.calibration.sources import Query

SWITCH = "AR_USE_MODELSCOPE"
_SHUFFLED = 1000
"""Records that a stream holds to draw the next one from."""


@dataclass(frozen=True)
class Place:
    """Where a set lies on a hub.

    Attributes:
        path: `owner/name`.
        splits: those used where the user names none.
        subsets: configurations that are read one after the other; None: the only one.
        files: pattern of its parquet files, for sets that come with a loading script.
    """

    path: str
    splits: tuple[str, ...] = ("train",)
    subsets: tuple[str | None, ...] = (None,)
    files: str | None = None


@dataclass(frozen=True)
class HubSet:
    """A named set on a hub. It satisfies `DatasetSource`; plugins may register more of them.

    Attributes:
        name: what a user types; `aliases` are other ways to say it.
        hub: where it is on the Hugging Face hub, or None.
        modelscope: where it is on ModelScope, if not under the same path.
        key: field of the text or messages; None: found by the usual names.
        pair: fields of a request and of its answer.
        allowed: the splits there are; empty: not known, the hub is asked.
        only: a field, and the values of it that are kept.
        streamed: read over the network record by record instead of downloaded whole.
    """

    name: str
    aliases: tuple[str, ...] = ()
    hub: Place | None = None
    modelscope: Place | None = None
    key: str | None = None
    pair: tuple[str, str] | None = None
    allowed: tuple[str, ...] = ()
    only: tuple[str, tuple[str, ...]] | None = None
    streamed: bool = True

    def records(self, query: Query) -> Iterable[Any]:
        """Return the records, not more than `query.limit` of every split of a stream.

        Raises:
            TunerError: no consent to download, an unknown split, a library that is not
                installed; while reading: what the hub answers.
        """
        scope = use_modelscope()
        place = (self.modelscope or self.hub) if scope else self.hub
        if place is None:
            msg = f"calibration dataset {self.name!r} is on ModelScope only: set {SWITCH}=1"
            raise TunerError(msg)
        if query.subset is not None and place.files is not None:
            msg = f"calibration dataset {self.name!r} has no subset {query.subset!r}: it has none"
            raise TunerError(msg)
        wrong = [split for split in query.splits if self.allowed and split not in self.allowed]
        if wrong:
            msg = (
                f"calibration dataset {self.name!r} has no split {wrong[0]!r}. "
                f"It has: {', '.join(self.allowed)}."
            )
            raise TunerError(msg)
        if not query.allow_download:
            where = "ModelScope" if scope else "the Hugging Face hub"
            msg = (
                f"calibration dataset {self.name!r} is on {where}: "
                "allow downloads to fetch it (--allow-download)"
            )
            raise TunerError(msg)
        library = "modelscope" if scope else "datasets"
        check_installed(library, f"calibration dataset {self.name!r}")
        return self._read(place, query, library)

    def _read(self, place: Place, query: Query, library: str) -> Iterator[Any]:
        module = load(library, f"calibration dataset {self.name!r}")
        subsets = (query.subset,) if query.subset is not None else place.subsets
        read = _from_modelscope if library == "modelscope" else _from_hugging_face
        streamed = self.streamed and not _is_offline(module)
        try:
            for subset, split in itertools.product(subsets, query.splits or place.splits):
                rows = read(module, place, subset, split, streamed=streamed)
                if streamed and hasattr(rows, "shuffle"):
                    rows = rows.shuffle(seed=query.seed, buffer_size=_SHUFFLED)
                chosen = (self._picked(row, query.key) for row in rows if self._is_meant(row))
                yield from itertools.islice(chosen, query.limit if streamed else None)
        except TunerError:
            raise
        except Exception as error:
            # hubs raise the errors of whatever they use for the network: OSError, httpx, requests
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            msg = f"calibration dataset {self.name!r} cannot be loaded: {reason}"
            raise TunerError(msg) from error

    def _is_meant(self, row: Any) -> bool:
        return self.only is None or row.get(self.only[0]) in self.only[1]

    def _picked(self, row: Any, key: str | None) -> Any:
        """Return the part of a record that holds its text; all of it where the user says which."""
        if key is not None or not isinstance(row, Mapping):
            return row
        fields = (self.key,) if self.key else self.pair or ()
        lost = [field for field in fields if field not in row]
        if lost:
            msg = (
                f"calibration dataset {self.name!r}: a record has no field {lost[0]!r}, only "
                f"{', '.join(map(str, row))}. Name the field with ':key=NAME'."
            )
            raise TunerError(msg)
        if self.pair is not None:
            asked, answer = self.pair
            return [
                {"role": "user", "content": row[asked]},
                {"role": "assistant", "content": row[answer]},
            ]
        return row[self.key] if self.key else row


def use_modelscope() -> bool:
    """Tell whether names are looked up on ModelScope: the environment variable says so.

    Raises:
        TunerError: the variable holds something else than 1, 0, true or false.
    """
    value = os.environ.get(SWITCH, "").strip().lower()
    if value not in ("", "0", "1", "true", "false"):
        msg = f"environment variable {SWITCH}={os.environ[SWITCH]!r}: use 1 or 0"
        raise TunerError(msg)
    return value in ("1", "true")


def _is_offline(module: Any) -> bool:
    """Tell whether `datasets` was told to use its cache alone, which it cannot stream from."""
    return bool(getattr(getattr(module, "config", None), "HF_HUB_OFFLINE", False))


def _from_hugging_face(
    datasets: Any, place: Place, subset: str | None, split: str, *, streamed: bool
) -> Any:
    if place.files is not None:
        files = f"hf://datasets/{place.path}/{place.files}"
        return datasets.load_dataset("parquet", data_files=files, split=split, streaming=streamed)
    return datasets.load_dataset(place.path, subset, split=split, streaming=streamed)


def _from_modelscope(
    modelscope: Any, place: Place, subset: str | None, split: str, *, streamed: bool
) -> Any:
    named = {} if subset is None else {"subset_name": subset}
    return modelscope.MsDataset.load(place.path, split=split, use_streaming=streamed, **named)


SETS: tuple[HubSet, ...] = (
    HubSet(
        "pile-10k",
        aliases=("NeelNanda/pile-10k",),
        hub=Place("NeelNanda/pile-10k"),
        modelscope=Place("swift/pile-val-backup", ("validation",), ("default",)),
        key="text",
        streamed=False,
    ),
    HubSet(
        "pile-val-backup",
        aliases=("swift/pile-val-backup",),
        modelscope=Place("swift/pile-val-backup", ("validation",), ("default",)),
        key="text",
    ),
    HubSet(
        "CCI3-HQ",
        aliases=("BAAI/CCI3-HQ",),
        hub=Place("BAAI/CCI3-HQ"),
        key="text",
        allowed=("train",),
    ),
    HubSet(
        "github-code-clean",
        aliases=("codeparrot/github-code-clean",),
        hub=Place("codeparrot/github-code-clean", files="data/train-*.parquet"),
        only=("license", ("mit", "apache-2.0")),
        allowed=("train",),
    ),
    HubSet(
        "OpenCodeInstruct",
        aliases=("nvidia/OpenCodeInstruct", "opencode-instruct"),
        hub=Place("nvidia/OpenCodeInstruct"),
        pair=("input", "output"),
        allowed=("train",),
    ),
    HubSet(
        "ultrachat_200k",
        aliases=("HuggingFaceH4/ultrachat_200k",),
        hub=Place("HuggingFaceH4/ultrachat_200k", ("train_sft",)),
        key="messages",
        allowed=("train_sft", "test_sft", "train_gen", "test_gen"),
    ),
    HubSet(
        "Ultra-FineWeb",
        aliases=("openbmb/Ultra-FineWeb",),
        hub=Place("openbmb/Ultra-FineWeb", ("en",)),
        key="content",
        allowed=("en", "zh"),
    ),
    HubSet(
        "fineweb-edu",
        aliases=("HuggingFaceFW/fineweb-edu", "AI-ModelScope/fineweb-edu"),
        hub=Place("HuggingFaceFW/fineweb-edu", subsets=("sample-10BT",)),
        modelscope=Place("AI-ModelScope/fineweb-edu", subsets=("sample-10BT",)),
        key="text",
        allowed=("train",),
    ),
    HubSet(
        "new-title-chinese",
        aliases=("madao33/new-title-chinese",),
        hub=Place("madao33/new-title-chinese"),
        key="content",
        streamed=False,
    ),
    HubSet(
        "mbpp",
        aliases=("google-research-datasets/mbpp",),
        hub=Place("google-research-datasets/mbpp", ("train", "validation", "test")),
        pair=("text", "code"),
        streamed=False,
    ),
)
"""The sets that auto-round knows by name, under the names it knows them by."""
