"""The report over noise levels says what the files of label_noise.py say."""

import json

import noise_levels
import pytest
from significance import paired_difference


def accuracy_of(values):
    return {
        "hyperparameters": {"rho": 0.5},
        "accuracy": values,
        "mean": sum(values) / len(values),
        "standard_error": 0.5,
    }


@pytest.fixture
def folder(tmp_path):
    """Results at 50 % noise: VaSSO is 1 and 3 points above SAM."""
    vasso = accuracy_of([81.0, 85.0])
    vasso["difference_to_sam"] = paired_difference([81.0, 85.0], [80.0, 82.0])
    methods = {"sam": accuracy_of([80.0, 82.0]), "vasso": vasso}
    trained = {"noise": 0.5, "seeds": 2, "methods": methods}
    point = {"standard_error": 1.0}
    tuned = {
        "seeds": 2,
        "methods": {
            "sam": [{"rho": 0.3, "accuracy": 70.0} | point],
            "vasso": [
                {"rho": 0.2, "theta": 0.4, "accuracy": 75.0} | point,
                {"rho": 0.8, "theta": 0.1, "accuracy": 74.0} | point,
                {"rho": 0.5, "theta": 0.4, "accuracy": 60.0} | point,
            ],
        },
    }
    (tmp_path / "label_noise_0.5.json").write_text(json.dumps(trained))
    (tmp_path / "label_noise_0.5_tuning.json").write_text(json.dumps(tuned))
    return tmp_path


def test_gains_are_paired_and_each_theta_is_at_its_best_radius(folder, capsys):
    assert noise_levels.main(["--noise", "0.5", "--results", str(folder)]) == 0
    (level,) = json.loads((folder / "noise_levels.json").read_text())["levels"]
    sam, vasso = level["gains"]
    assert sam["gain"] is None
    assert vasso["gain"]["mean"] == 2
    best = [(row["theta"], row["rho"]) for row in level["by_theta"]]
    assert best == [(0.1, 0.8), (0.4, 0.2), (1.0, 0.3)]
    assert (folder / "noise_levels.png").stat().st_size > 5000
    assert "+2.0 ± 1.0" in capsys.readouterr().out


def test_a_missing_file_is_a_line_with_the_command_that_writes_it(folder, capsys):
    (folder / "label_noise_0.5_tuning.json").unlink()
    with pytest.raises(SystemExit) as exit_of:
        noise_levels.main(["--noise", "0.5", "--results", str(folder)])
    assert exit_of.value.code == 2
    error = capsys.readouterr().err
    assert "examples/label_noise.py --noise 0.5 --tune" in error
    assert error.count("\n") == 1
