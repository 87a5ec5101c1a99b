"""Samples in WebDataset tars: which members belong together, and the labels in their annotations.

A sample is a sound file and its annotations, which have the same name but for the suffix: `KEY.flac` and `KEY.json`.
WebDataset ends the key at the first dot of the base name. Here the suffix is what is known to be one, at the end of the
name: a sound's suffix, or that of an annotation, such as `cls` or `meta.json`. So keys may contain dots, and
`clip.v1.flac` goes with `clip.v1.json`. Where that pairs nothing, the longer name's suffix may have dots: `clip.json`
describes every `clip.*.flac` if there is no `clip.flac`.
"""

import codecs
import re
import sys
import tarfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from erann_dist.data.audio import SUFFIXES
from erann_dist.data.manifest import MAX_LABELS
from erann_dist.errors import UsageError, UserError
from erann_dist.formats import strict_json
from shards.sources.class_lists import ClassList
from shards.sources.containers.tar import require_end
from shards.sources.rows import printable

_MAX_TEXT_BYTES = 1_000_000  # of an annotation
_SHOWN_KEYS = 8  # How many keys of a JSON file a message lists.
# With more clips than this, labels that most clips share with no other clip are captions.
_FEW_CLIPS = 100
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Field:
    """Where a sample has a value: in the text of its member with this suffix, or at a path of keys in its JSON."""

    suffix: str  # in lower case, without the first dot
    path: str | None = None

    def __str__(self) -> str:
        return self.suffix if self.path is None else f"{self.suffix}:{self.path}"


@dataclass(frozen=True)
class Fields:
    """Where samples have their labels, split and fold. Of several places for labels, the first that has any counts."""

    labels: tuple[Field, ...] = (Field("json", "labels"), Field("json", "label"), Field("cls"), Field("txt"))
    split: Field = Field("json", "split")
    fold: Field = Field("json", "fold")

    @property
    def all(self) -> tuple[Field, ...]:
        return *self.labels, self.split, self.fold


def parse_fields(labels: str | None = None, split: str | None = None, fold: str | None = None) -> Fields:
    """The fields as the user writes them: `json:PATH`, `meta.json:PATH`, `cls`, `txt`; None: the usual place.

    Raises UsageError.
    """
    usual = Fields()
    return Fields(
        (_parse("--labels", labels),) if labels else usual.labels,
        _parse("--split", split) if split else usual.split,
        _parse("--fold", fold) if fold else usual.fold,
    )


def _parse(option: str, text: str) -> Field:
    suffix, colon, path = text.partition(":")
    suffix = suffix.lower().removeprefix(".")
    is_json = suffix.rpartition(".")[2] == "json"
    if not re.fullmatch(r"\w[\w.-]*", suffix) or is_json != bool(path) or is_json != bool(colon):
        raise UsageError(f"{option} {text}: not a place in a sample; expected: json:KEY, json:KEY.KEY, cls or txt")
    if f".{suffix.rpartition('.')[2]}" in SUFFIXES:
        raise UsageError(f"{option} {text}: .{suffix} files are sound; expected: json:KEY, cls or txt")
    return Field(suffix, path or None)


class Member(NamedTuple):
    """A sound file in a tar."""

    file: str  # its name in the tar
    suffix: str  # in lower case, without the dot
    offset: int  # of its first byte in the tar
    size: int  # bytes
    plain: bool  # a regular file, not sparse: of a few bytes in the tar, a sparse file may yield terabytes


@dataclass(slots=True)
class Sample:
    """A sample: a sound file with its labels, or one of both."""

    tar: int  # the number of its tar
    name: str  # the path in the tar without the suffix
    sound: Member | None
    labels: tuple[str, ...]  # ascending
    split: str | None
    fold: int | None
    problem: str  # why it has no label
    is_copy: bool  # another sound file for an earlier sample's annotations

    @property
    def shown_name(self) -> str:
        """The sound file's name in the tar, or else the sample's."""
        name = self.sound.file if self.sound else self.name
        return printable(name.encode(errors="surrogateescape"))


@dataclass(eq=False)
class _Annotation:
    """The values of one annotation file by field, or why it can't be used."""

    values: dict[Field, list[str]] = field(default_factory=dict)
    problem: str = ""


@dataclass(eq=False)
class _Draft:
    """A sample whose members are still being collected."""

    name: str
    sound: Member | None = None
    annotations: dict[str, _Annotation] = field(default_factory=dict)  # by suffix
    is_copy: bool = False
    is_attached: bool = False  # to sounds with a longer name


def read_samples(file: BinaryIO, number: int, fields: Fields) -> tuple[list[Sample], str]:
    """The samples of a tar in order, and its damage, empty for a whole tar: then they are those before the damage.

    The sound is not read. A second sound file or annotation of one name and kind begins a new sample, as in a tar in
    which the numbering starts again. Of several sound files in sequence with annotations for one only, the further ones
    are copies. What belongs to no sound file is a sample without sound.

    number: of the tar. Raises what reading the file raises, other than OSError.
    """
    kinds = sorted({each.suffix for each in fields.all}, key=len, reverse=True)
    drafts: list[_Draft] = []
    latest: dict[str, _Draft] = {}
    others: list[str] = []
    run: list[_Draft] = []  # of one name, without another in between
    damage = ""

    def draft(name: str, kind: str | None) -> _Draft:
        """The sample that this member, a sound file if `kind` is None, belongs to."""
        nonlocal run
        found = latest.get(name)
        if found is None or (found.sound is not None if kind is None else kind in found.annotations):
            found = latest[name] = _Draft(name)
            drafts.append(found)
        if run and run[0].name != name:
            _share(run)
            run = []
        if found not in run:
            run.append(found)
        return found

    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps every header
                path = member.name.removeprefix("./")
                base = path.rpartition("/")[2]
                if member.isdir() or not base or base.startswith("."):
                    continue
                suffix = base.rpartition(".")[2].lower() if "." in base else ""
                kind = next(
                    (kind for kind in kinds if base.lower().endswith(f".{kind}") and len(base) > len(kind) + 1), ""
                )
                if f".{suffix}" in SUFFIXES:
                    sound = Member(member.name, suffix, member.offset_data, member.size, _is_plain(member))
                    draft(path[: -len(suffix) - 1], None).sound = sound
                elif kind:
                    name = path[: -len(kind) - 1]
                    draft(name, kind).annotations[kind] = _read_annotation(tar, member, kind, fields)
                else:
                    others.append(path)
            require_end(tar)
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError, IndexError) as error:  # of a damaged header too
        damage = str(error) or type(error).__name__
    _share(run)
    _attach(drafts)
    return [_sample(each, number, fields) for each in _reported(drafts, others)], damage


def _is_plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _share(run: list[_Draft]) -> None:
    """Give annotations of which there is one in the run to all of its sounds, which then are copies of one sample."""
    if len(run) < 2:
        return
    for kind in {kind for each in run for kind in each.annotations}:
        holders = [each for each in run if kind in each.annotations]
        if len(holders) == 1:
            for each in run:
                each.annotations[kind] = holders[0].annotations[kind]
    for each in run[1:]:
        each.is_copy = each.annotations == run[0].annotations


def _attach(drafts: list[_Draft]) -> None:
    """Give annotations of a name that no sound has to the sounds with that name and more after a dot."""
    sounds = {each.name for each in drafts if each.sound}
    alone = {each.name: each for each in drafts if each.name not in sounds}
    for each in drafts:
        for prefix in _dotted_prefixes(each.name) if each.sound and alone else ():
            if prefix in alone:
                alone[prefix].is_attached = True
                each.annotations = alone[prefix].annotations | each.annotations


def _reported(drafts: list[_Draft], others: list[str]) -> Iterator[_Draft]:
    """The samples, and those without sound that are no part of another one."""
    sounds = {each.name for each in drafts if each.sound}
    heads = {_webdataset_key(name) for name in sounds}
    seen = {each.name for each in drafts}
    for each in drafts:
        if each.sound or not (each.is_attached or any(name in sounds for name in _dotted_prefixes(each.name))):
            yield each
    for name in others:
        key = _webdataset_key(name)
        if key not in heads and not any(prefix in seen for prefix in (key, *_dotted_prefixes(name))):
            seen.add(key)
            yield _Draft(key)


def _dotted_prefixes(name: str) -> Iterator[str]:
    """What comes before each dot of the base name, the longest first."""
    start = name.rfind("/") + 2  # a dot at the beginning ends nothing
    while (dot := name.rfind(".", start)) >= 0:
        name = name[:dot]
        yield name


def _webdataset_key(name: str) -> str:
    return min(_dotted_prefixes(name), key=len, default=name)


def _read_annotation(tar: tarfile.TarFile, member: tarfile.TarInfo, kind: str, fields: Fields) -> _Annotation:
    if not _is_plain(member):
        return _Annotation(problem=f"its {kind} is a link or a sparse file, not a plain one")
    if member.size > _MAX_TEXT_BYTES:
        return _Annotation(problem=f"its {kind} has more than {_MAX_TEXT_BYTES:,} bytes")
    content = tar.extractfile(member)
    assert content  # None only for members that are not regular files
    data = content.read()
    wanted = [each for each in fields.all if each.suffix == kind]
    try:
        text = _decoded(data)
        if wanted[0].path is None:
            lines = [line.strip() for line in text.splitlines()]
            return _Annotation({each: [line for line in lines if line] for each in wanted})
        content_of_json = strict_json.loads(text)
    except UnicodeDecodeError:
        return _Annotation(problem=f"its {kind} is not text in UTF-8 or UTF-16")
    except ValueError:
        return _Annotation(problem=f"its {kind} is not JSON")
    return _from_json(content_of_json, kind, wanted)


def _from_json(content: Any, kind: str, wanted: list[Field]) -> _Annotation:
    found = _Annotation()
    for each in wanted:
        values = list(_at(content, each.path))
        if any(isinstance(value, dict) for value in values):
            found.problem = found.problem or f"{each.path} in its {kind} is an object, not a label"
        texts = (str(value).strip() for value in values if value is not None and not isinstance(value, dict))
        found.values[each] = [text for text in texts if text]
    if not found.problem and isinstance(content, dict):
        keys = [key if key.isprintable() else ascii(key) for key in list(content)[:_SHOWN_KEYS]]
        missing = " or ".join(dict.fromkeys(each.path or "" for each in wanted if each.path not in ("split", "fold")))
        found.problem = f"its {kind} has no {missing or 'label'}; its keys are {', '.join(keys) or 'none'}"
    return found


def _at(content: Any, path: str | None) -> Iterator[Any]:
    """The values at a path of keys joined by dots. A list has those of its items."""
    if isinstance(content, list):
        for item in content:
            yield from _at(item, path)
    elif path is None:
        yield content
    elif isinstance(content, dict):
        head, _, rest = path.partition(".")
        if path in content:  # also a key that contains a dot
            yield from _at(content[path], None)
        elif head in content and rest:
            yield from _at(content[head], rest)


def _decoded(data: bytes) -> str:
    """Text in UTF-8 or UTF-16, with or without a byte order mark. Raises UnicodeDecodeError."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data.decode(encoding)
    if 0 in data[:2] and len(data) > 1:  # no text begins with NUL, so this is half of a UTF-16 letter
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le")
    return data.decode()


def _sample(draft: _Draft, number: int, fields: Fields) -> Sample:
    def values(place: Field) -> list[str]:
        annotation = draft.annotations.get(place.suffix)
        return annotation.values.get(place, []) if annotation else []

    labels = next(filter(None, map(values, fields.labels)), [])
    problem = ""
    if not labels:
        there = (draft.annotations.get(each.suffix) for each in fields.labels)
        problem = next((each.problem for each in there if each and each.problem), "no label")
        if len(fields.labels) == 1 and fields.labels[0].suffix not in draft.annotations:
            problem = f"no {fields.labels[0].suffix} next to it"
    fold = next(iter(values(fields.fold)), "")
    is_fold = re.fullmatch(r"0*([0-9]{1,3})(\.0)?", fold)
    return Sample(
        tar=number,
        name=draft.name,
        sound=draft.sound,
        labels=tuple(sorted({sys.intern(label) for label in labels})),
        split=next(map(sys.intern, values(fields.split)), None),
        fold=int(is_fold[1]) if is_fold and int(is_fold[1]) < 128 else None,
        problem=problem,
        is_copy=draft.is_copy,
    )


def unique_names(samples: Sequence[Sample], tars: Sequence[str]) -> list[str]:
    """A name for each sample with which it is unique in the set.

    That is its name in its tar. If different samples in several tars have it, each gets its tar's name in front; and
    #2, #3, … after it, if different samples in one tar have it. Samples of one name with the same labels and as many
    bytes of sound are one sample: they keep one name, and all but one of them are duplicates.
    """
    first: dict[str, int] = {}
    several: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        if not sample.sound:
            continue
        if (before := first.setdefault(sample.name, i)) != i:
            several.setdefault(sample.name, [before]).append(i)
    names = [sample.name for sample in samples]
    taken = set(first)
    for name, members in several.items():
        different: dict[tuple[Any, ...], list[int]] = {}
        previous: tuple[Any, ...] = ()
        for i in members:
            sample = samples[i]
            if not sample.is_copy:
                previous = (sample.labels, sample.sound.size if sample.sound else 0)
            different.setdefault(previous, []).append(i)
        spread = len({samples[same[0]].tar for same in different.values()}) > 1
        for number, same in enumerate(different.values()):
            tar = tars[samples[same[0]].tar]
            wanted = f"{tar}/{name}" if spread else name
            chosen, again = wanted, 1
            while chosen in taken and (number or chosen != name):
                again += 1
                chosen = f"{wanted}#{again}"
            taken.add(chosen)
            for i in same:
                names[i] = chosen
    return names


@dataclass(frozen=True)
class LabelSpace:
    """A set's labels in order."""

    ids: list[str]
    names: list[str]
    place: dict[str, int]  # of a label's id and, unless it is another label's id, its name

    def unknown(self, labels: Collection[str]) -> str | None:
        """The first of these labels that is not in the list."""
        return next((label for label in labels if label not in self.place), None)


def label_space(where: str, samples: Sequence[Sample], classes: ClassList | None) -> LabelSpace:
    """The labels of a set: those in a class list or those found, sorted.

    Without a class list, captions are not accepted as classes. Labels are treated as captions if more than half of the
    clips, of more than 100, share no label with another clip, and if there are more labels than a manifest can have.
    Raises UserError, also when no clip has a label.
    """
    labelled = [sample for sample in samples if sample.sound and sample.labels and not sample.is_copy]
    if not labelled:
        problems = (f"{sample.shown_name}: {sample.problem}" for sample in samples if sample.sound)
        raise UserError(
            f"{where}: no clip has a label ({next(problems, 'no sound')})", "give their place with --labels"
        )
    if classes is None:
        uses: dict[str, int] = {}
        for sample in labelled:
            for label in sample.labels:
                uses[label] = uses.get(label, 0) + 1
        alone = sum(all(uses[label] == 1 for label in sample.labels) for sample in labelled)
        if len(uses) > MAX_LABELS or (len(labelled) > _FEW_CLIPS and alone > len(labelled) / 2):
            raise UserError(
                f"{where}: {len(uses):,} different labels in {len(labelled):,} clips, such as "
                f"{labelled[0].labels[0][:60]!r}: captions rather than classes",
                "choose other labels with --labels json:KEY, or list the classes with --classes",
            )
        ids = names = sorted(uses, key=_natural)
    else:
        ids, names = classes.ids, classes.names
    if len(ids) > MAX_LABELS:
        raise UserError(f"{where}: {len(ids):,} labels, and a manifest has at most {MAX_LABELS:,}")
    place = {name: i for i, name in reversed(list(enumerate(names)))} | {label: i for i, label in enumerate(ids)}
    return LabelSpace(ids, names, place)


def _natural(label: str) -> tuple[bool, int, str]:
    """A sort key: numbers by value, before words."""
    is_number = label.isdecimal() and len(label) <= 1000
    return (not is_number, int(label) if is_number else 0, label)
