"""The pictures of a report: curves, classes, confusions, first filters, and those that are given."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import nn

from distinit_plugin.analysis.confusion import draw_confusion
from distinit_plugin.analysis.filters import draw_filters, filter_numbers, first_filters
from distinit_plugin.analysis.page import Block, Picture, Text
from distinit_plugin.analysis.per_class import compare_runs, draw_comparison, summary
from distinit_plugin.analysis.report_runs import OWN_COLUMNS
from distinit_plugin.analysis.run_facts import RunFacts
from distinit_plugin.analysis.study_table import Study
from distinit_plugin.engine.curves import draw_curves
from distinit_plugin.engine.ensemble import Scores, read_scores
from distinit_plugin.engine.evaluate import confusion_of
from distinit_plugin.engine.figures import COLOURS
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.ensembling import scores_file
from distinit_plugin.jobs.trained import read_trained
from distinit_plugin.jobs.visualize_networks import checkpoint_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = 12
"""Runs in one picture of curves."""
MOST_CURVES = 12
MOST_PAIRS = 6
MOST_CONFUSIONS = 6
MOST_TESTED = 16
"""Runs whose scores are read, those that others are compared with first: Kinetics-400's take 64 MB each."""
MOST_FILTERS = 6
FILTERS = 3
"""Networks in one picture of filters."""

GIVEN_SIDE = 2400
"""Pixels of the longer side of pictures that are given; larger ones are made smaller."""
GIVEN_BYTES = 1_500_000
"""Of such a picture; what is larger gets 256 colours."""

_OWN_COLOURS = 96
_SHADES = 16
"""Between a line's colour and white: edges of lines and letters are smooth."""
_NEAR = 8
"""Two colours that differ by so little may be taken for each other, and white would become grey."""


def picture(name: str, figure: Figure, alt: str, caption: str) -> Picture:
    """A figure as a small PNG of 256 colours: those of lines, which legends need however thin they are, and its own."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    whole = Image.open(file).convert("RGB")
    palette = Image.new("P", (1, 1))
    palette.putpalette(_colours(whole))
    small = _png(whole.quantize(palette=palette, dither=Image.Dither.NONE))
    return Picture(name, small, whole.width, whole.height, alt, caption)


@functools.cache
def _line_colours() -> tuple[int, ...]:
    """Red, green, blue of the shades of ``COLOURS``, black and white among them."""
    return tuple(
        round(255 - (255 - int(colour[place : place + 2], 16)) * shade / _SHADES)
        for colour in COLOURS
        for shade in range(_SHADES + 1)
        for place in (1, 3, 5)
    )


def _colours(image: Image.Image) -> list[int]:
    """Red, green, blue of a palette: shades of lines, and the picture's own colours that are none of these."""
    known = np.array(_line_colours()).reshape(-1, 3)
    own = np.array(image.quantize(_OWN_COLOURS).getpalette()).reshape(-1, 3)
    far = np.abs(own[:, None] - known).max(axis=2).min(axis=1) > _NEAR
    return [int(value) for value in np.concatenate([known, own[far]])[:256].flatten()]


def representatives(runs: Sequence[RunFacts], study: Study | None) -> list[RunFacts]:
    """The runs that are drawn: of each (chosen) row of a study, and of others that differ in their seed alone, one."""
    rows = {} if study is None else {name: study.rows[name] for name in study.shown or study.rows}
    row_of = {folder: name for name, row in rows.items() for folder in row.values()}
    others = {folder for row in study.rows.values() for folder in row.values()} - {*row_of} if study is not None else {}
    found: dict[object, RunFacts] = {}
    for facts in runs:
        if facts.folder in row_of:
            if facts.settings:
                found.setdefault(row_of[facts.folder], facts)
            continue
        if facts.folder in others:
            continue
        settings = {key: value for key, value in facts.settings.items() if key not in OWN_COLUMNS}
        found.setdefault(frozenset(settings.items()) or id(facts), facts)
    return list(found.values())


def curve_blocks(runs: Sequence[RunFacts]) -> list[Block]:
    """Curves of runs, those of one network that learns from the same in one picture."""
    groups: dict[tuple[str, str], list[RunFacts]] = {}
    for facts in runs:
        if facts.curves is not None:
            groups.setdefault((facts.described.network, facts.described.teaching), []).append(facts)
    parts = [
        (names, start // CURVES, own[start : start + CURVES])
        for names, own in groups.items()
        for start in range(0, len(own), CURVES)
    ]
    blocks: list[Block] = []
    for number, ((network, teaching), part, own) in enumerate(parts[:MOST_CURVES], start=1):
        what = f"{network or 'unknown network'}{f' that learns from {teaching}' if teaching else ''}{_part(part)}"
        ends = [
            f"{facts.name} ends at a loss of {facts.curves.train_loss[max(facts.curves.train_loss)]:.3g}"
            for facts in own
            if facts.curves is not None and facts.curves.train_loss
        ]
        figure = draw_curves({facts.name: facts.curves for facts in own if facts.curves is not None})
        alt = f"Loss, accuracy where it is known, and learning rate over epochs. {'; '.join(ends)}."
        blocks.append(
            picture(f"curves_{number}", figure, alt, f"Curves of {len(own)} run{'s'[: len(own) > 1]}: {what}")
        )
    if len(parts) > MOST_CURVES:
        left = sum(len(own) for _, _, own in parts[MOST_CURVES:])
        blocks.append(Text(f"{left} runs more have curves: distinit visualize curves RUN… draws them.", "soft"))
    return blocks


def _part(number: int) -> str:
    """Two pictures have different captions."""
    return f", part {number + 1}" if number else ""


# -------------------------------------------------------------------------------------------------------- classes
def class_pictures(runs: Sequence[RunFacts], baselines: Collection[Path]) -> list[Block]:
    """Gains by class over one run of each network, and confusions.

    Args:
        runs: See ``representatives``.
        baselines: Folders of runs that those of their network are compared with; where it has none: its first run.
    """
    blocks: list[Block] = []
    able = [facts for facts in runs if scores_file(facts.folder).is_file()]
    able.sort(key=lambda facts: facts.folder not in baselines)
    unread = max(len(able) - MOST_TESTED, 0)
    tested = [(facts, scores) for facts in able[:MOST_TESTED] if (scores := _scores(facts, blocks)) is not None]
    pairs = list(_pairs(tested, baselines))
    for number, (one, other) in enumerate(pairs[:MOST_PAIRS], start=1):
        try:
            found = compare_runs(one, other)
        except UserError as error:
            blocks.append(Text(f"{one.name} and {other.name} cannot be compared: {error}", "soft"))
            continue
        told = summary(found)
        caption = f"Gain by class: {one.name} over {other.name}"
        blocks.append(picture(f"per_class_{number}", draw_comparison(found), told, caption))
    if left := max(len(pairs) - MOST_PAIRS, 0) + unread:
        blocks.append(Text(f"{_more(left, 'pair')}: distinit visualize per-class RUN OTHER.", "soft"))
    for number, (facts, scores) in enumerate(tested[:MOST_CONFUSIONS], start=1):
        table = confusion_of(scores.labels, scores.values.argmax(axis=1), len(scores.class_names))
        alt = f"Confusion matrix of {len(scores.class_names)} classes; the diagonal holds {int(table.trace())} of "
        alt += f"{int(table.sum())} videos."
        figure = draw_confusion(facts.name, table, scores.class_names)
        blocks.append(picture(f"confusion_{number}", figure, alt, f"Confusions of {facts.name}"))
    if left := max(len(tested) - MOST_CONFUSIONS, 0) + unread:
        blocks.append(Text(f"{_more(left, 'run')}: distinit visualize confusion RUN.", "soft"))
    return blocks


def _more(count: int, what: str) -> str:
    return f"{count} {what}{'s'[: count > 1]} more can be drawn"


def _scores(facts: RunFacts, blocks: list[Block]) -> Scores | None:
    try:
        found = read_scores(scores_file(facts.folder), "probs")
    except UserError as error:
        blocks.append(Text(str(error), "warn"))
        return None
    return Scores(facts.name, found.paths, found.labels, found.values, found.class_names)


def _pairs(tested: list[tuple[RunFacts, Scores]], baselines: Collection[Path]) -> Iterator[tuple[Scores, Scores]]:
    """Each run with the one that it is compared with: of the same classes and network."""
    groups: dict[tuple[str, tuple[str, ...]], list[tuple[RunFacts, Scores]]] = {}
    for facts, scores in tested:
        groups.setdefault((facts.described.network, tuple(scores.class_names)), []).append((facts, scores))
    for own in groups.values():
        named = [scores for facts, scores in own if facts.folder in baselines]
        base = named[0] if named else own[0][1]
        yield from ((scores, base) for _, scores in own if scores is not base)


# -------------------------------------------------------------------------------------------------------- filters
def filter_blocks(runs: Sequence[RunFacts]) -> list[Block]:
    """First filters of networks whose checkpoints are there; ``runs``: see ``representatives``."""
    groups: dict[str, list[RunFacts]] = {}
    able = [facts for facts in runs if facts.settings and _has_checkpoint(facts)]
    for facts in able[:MOST_FILTERS]:
        groups.setdefault(facts.described.network, []).append(facts)
    blocks: list[Block] = []
    for network, own in groups.items():
        for start in range(0, len(own), FILTERS):
            title = f"First filters of {network or 'networks'}{_part(start // FILTERS)}"
            blocks += _filters(f"filters_{len(blocks) + 1}", title, own[start : start + FILTERS])
    if len(able) > MOST_FILTERS:
        blocks.append(Text(f"{_more(len(able) - MOST_FILTERS, 'network')}: distinit visualize filters RUN…", "soft"))
    return blocks


def _has_checkpoint(facts: RunFacts) -> bool:
    try:
        checkpoint_of(str(facts.folder))
    except UserError:
        return False
    return True


def _filters(name: str, title: str, runs: Sequence[RunFacts]) -> list[Block]:
    found, blocks = [], list[Block]()
    for facts in runs:
        try:
            trained = read_trained(checkpoint_of(str(facts.folder)), boxes=True).network()
            assert isinstance(trained, nn.Module)
            found += first_filters(facts.name, trained, trained.view_specs("test"))
        except UserError as error:
            blocks.append(Text(f"The filters of {facts.name} cannot be drawn: {error}", "soft"))
    if found:
        shares = [
            f"{layer['network']}, {layer['layer']}: mean share of temporal variance {layer['mean_share']:.3f}"
            for layer in filter_numbers(found)["layers"]
            if layer["mean_share"] is not None
        ]
        alt = f"First filters over time. {'; '.join(shares)}."
        blocks.append(picture(name, draw_filters(found), alt, title))
    return blocks


# ---------------------------------------------------------------------------------------------------------- given
def given_blocks(pictures: Mapping[str, Path]) -> list[Block]:
    """Pictures that were made before: ``distinit visualize``'s, a probe's, or any other PNG.

    Args:
        pictures: Caption → file.

    Raises:
        UserError: One cannot be read as a PNG.
    """
    return [_given(f"figure_{number}", title, path) for number, (title, path) in enumerate(pictures.items(), start=1)]


def _given(name: str, title: str, path: Path) -> Picture:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as file:
                own = file.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(
            f"--pictures {path} cannot be read as a PNG ({reason}). Name pictures as distinit visualize makes them."
        ) from error
    own.thumbnail((GIVEN_SIDE, GIVEN_SIDE))
    whole = Image.new("RGB", own.size, "white")
    whole.paste(own, mask=own.getchannel("A"))
    contents = _png(whole)
    if len(contents) > GIVEN_BYTES:
        contents = _png(whole.quantize(256))
    return Picture(name, contents, *whole.size, f"A picture that was made before the report: {title}", title)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()
