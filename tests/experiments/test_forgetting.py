"""What is forgotten: compared with AdamW where both have learned as much."""

import json

import numpy as np
import pytest

from experiments import forgetting
from experiments.harness import annealing
from experiments.harness.language_methods import METHODS
from experiments.harness.progress import Progress
from experiments.harness.transformer import Transformer
from experiments.tasks.corpus import VOCABULARY, evenly_spaced_windows, read

# AdamW's losses by length, text and seed; the second seed forgets twice as much.
CURVE = {
    0: {"new": [5.0, 5.0], "old": [1.0, 1.0]},
    100: {"new": [4.0, 4.0], "old": [2.0, 3.0]},
    200: {"new": [3.0, 3.0], "old": [3.0, 5.0]},
    400: {"new": [2.0, 2.0], "old": [4.0, 7.0]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of the smoke test."""
    folder = tmp_path_factory.mktemp("runs")
    assert forgetting.main(["--smoke", "--runs", str(folder)]) == 0
    return folder


def test_adamw_loses_between_two_lengths_what_lies_between_theirs():
    curve = {length: CURVE[length] for length in (100, 200, 400)}
    assert forgetting.lost_by_adamw(curve, [3.5, 3.5]) == [2.5, 4.0]
    assert forgetting.lost_by_adamw(curve, [2.0, 4.0]) == [4.0, 3.0]


def test_nothing_is_said_beyond_the_lengths_of_adamw():
    curve = {length: CURVE[length] for length in (100, 200, 400)}
    assert forgetting.lost_by_adamw(curve, [1.9, 4.1]) == [None, None]


def test_differences_are_paired_by_seed_and_adamw_has_its_other_lengths():
    losses = {"new": [3.5, 2.5], "old": [2.6, 6.3]}  # Of AdamW 2.5 and 6.
    outside = {"new": [4.5, 2.5], "old": [1.0, 6.0]}  # AdamW before it has begun.
    found = forgetting.summaries(
        CURVE, {"momentum_sam": [({"rho": 0.1}, losses), ({"rho": 0.3}, outside)]}, 200
    )
    first, second = found["families"]["momentum_sam"]
    assert first["lost"]["mean"] == pytest.approx(0.2)
    assert first["lost"]["standard_error"] == pytest.approx(0.1)
    assert second["lost"] is None
    # At 200 both are on a line between the other two.
    (adamw,) = found["families"]["adamw"]
    assert adamw["lost"]["mean"] == pytest.approx(0)
    assert adamw["old"]["values"] == CURVE[200]["old"]
    header, lines = forgetting.cells(found | {"gradients": 200})
    assert {len(line) for line in lines} == {len(header)}
    assert [line[1] for line in lines] == ["0", "100", "400", "200", "200", "200"]
    assert [line[-1] for line in lines[-2:]] == [
        "+0.200 ± 0.100",
        "outside AdamW's range",
    ]


def test_without_a_gradient_the_losses_are_those_of_the_start():
    """And on the text that was trained on they are those of an annealing at rate 0."""
    model = Transformer(8, 1, VOCABULARY, annealing.CONTEXT)
    text = read().text["training"].astype(np.int32)
    windows = {"old": evenly_spaced_windows(text, 64, annealing.CONTEXT + 1)}
    setting = {"learning_rate": 0.01, "weight_decay": 0.1, "newest": 1.0}
    steps, progress = annealing.STEPS_PER_CALL, Progress("", 0)
    starts = annealing.pretrain(
        model, text, setting, [0, 1], steps=steps, progress=progress
    )

    def losses(gradients, rate):
        return annealing.anneal(
            *(
                model,
                METHODS["adamw"],
                text,
                windows,
                setting | {"learning_rate": rate},
            ),
            *(starts, [0, 1]),
            bits=(),
            gradients=gradients,
            progress=progress,
        )["old"]

    assert losses(0, 0.01).shape == (2, 1)
    np.testing.assert_allclose(losses(0, 0.01), losses(steps, 0.0), atol=1e-6)
    assert progress.done == 2 * 2 * steps


@pytest.mark.exhaustive  # .ci/run makes the same smoke run
def test_the_smoke_run_measures_both_texts_and_is_not_done_again(folder, monkeypatch):
    found = json.loads((folder / "smoke/forgetting.json").read_text())
    assert found["finished"]
    assert list(found["curve"]) == ["0", "100", "200"]
    of_settings = [one for settings in found["families"].values() for one in settings]
    for one in [*found["curve"].values(), *of_settings]:
        for text in forgetting.TEXTS:
            assert len(one[text]["values"]) == 2
    # English is learned.
    assert found["curve"]["200"]["new"]["mean"] < found["curve"]["0"]["new"]["mean"]
    assert (folder / "smoke/forgetting.png").stat().st_size > 5000

    def train(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(annealing, "pretrain", train)
    monkeypatch.setattr(annealing, "anneal", train)
    assert forgetting.main(["--smoke", "--runs", str(folder)]) == 0
