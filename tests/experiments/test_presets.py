"""Every value of a preset has a true source, and every published figure a place."""

import json
from pathlib import Path

import pytest

from experiments.vision import (
    cifar,
    methods,
    models,
    options as vision_options,
)
from experiments.vision.presets import PRESETS
from experiments.vision.sources import (
    ASAM_README,
    FRIENDLY_SCRIPT,
    OURS,
    STATEMENTS,
    SUMMARY_2023,
    SUMMARY_2025,
    VASSO_CODE,
    VASSO_README,
    VASSO_SCRIPT,
)

ROOT = Path(__file__).parents[2]
CHOSEN = ("dataset", "model", "method")


def test_every_preset_parses_and_every_value_has_a_source():
    for name, preset in PRESETS.items():
        given = ["--preset", name, "--data-dir", "x"]
        options = vision_options.parse_arguments(given)
        assert options.model in models.MODELS
        assert options.method in methods.METHODS
        assert not options.changed
        for option, (value, source) in preset.settings.items():
            assert getattr(options, option) == value
            assert source or option in CHOSEN
        other = "float32" if options.dtype == "bfloat16" else "bfloat16"
        options = vision_options.parse_arguments([*given, "--dtype", other])
        assert options.changed == {"dtype": other}


@pytest.mark.parametrize(
    ("name", "option", "value", "source"),
    [
        ("vasso_resnet18_cifar10", "rho", 0.1, SUMMARY_2025),
        ("vasso_resnet18_cifar10", "weight_decay", 1e-3, VASSO_README),
        ("sgd_resnet18_cifar10", "weight_decay", 5e-4, VASSO_README),
        ("vasso_resnet18_cifar100", "rho", 0.2, OURS),
        ("sam_resnet18_cifar100", "rho", 0.2, FRIENDLY_SCRIPT),
        ("vasso_wrn28_10_cifar100", "rho", 0.2, VASSO_SCRIPT),
        ("vasso_wrn28_10_cifar100", "theta", 0.9, VASSO_SCRIPT),
        ("vasso_wrn28_10_cifar100", "learning_rate", 0.1, VASSO_SCRIPT),
        ("sgd_wrn28_10_cifar100", "learning_rate", 0.1, OURS),
        ("vasso_wrn28_10_cifar10", "learning_rate", 0.1, OURS),
        ("vasso_wrn28_10_cifar10", "rho", 0.1, OURS),
        ("vasso_wrn28_10_cifar10", "theta", 0.4, SUMMARY_2023),
        ("vasso_vgg16_bn_cifar10", "rho", 0.1, OURS),
        ("vasso_vgg16_bn_cifar10", "theta", 0.9, OURS),
        ("vasso_vgg16_bn_cifar10", "learning_rate", 0.05, VASSO_CODE),
        ("friendly_sam_vgg16_bn_512_cifar100", "rho", 0.2, FRIENDLY_SCRIPT),
        ("friendly_sam_vgg16_bn_512_cifar10", "rho", 0.1, OURS),
        ("friendly_sam_vgg16_bn_cifar100", "rho", 0.2, OURS),
        ("friendly_sam_wrn28_10_cifar100", "learning_rate", 0.1, OURS),
        ("friendly_sam_wrn34_10_cifar100", "learning_rate", 0.05, FRIENDLY_SCRIPT),
        ("asam_wrn28_10_cifar100", "rho", 1.0, ASAM_README),
        ("asam_resnet18_cifar10", "rho", 0.5, OURS),
        ("evasso_resnet18_cifar100", "theta", 0.4, OURS),
        ("evasso_resnet18_cifar100", "probability", 0.3, OURS),
        ("sgd_pyramidnet110_cifar10", "learning_rate", 0.05, OURS),
        ("vasso_resnet18_cifar10_noise25", "label_noise", 0.25, OURS),
        ("vasso_resnet18_cifar10_noise25", "theta", 0.2, OURS),
        ("vasso_resnet18_cifar10_noise50", "label_noise", 0.5, SUMMARY_2023),
        ("vasso_resnet18_cifar10_noise75", "rho", 0.1, OURS),
        ("lagged_vasso_resnet18_cifar10_noise75", "theta", 0.4, OURS),
        ("lagged_vasso_resnet18_cifar10", "recollect", 40, OURS),
    ],
)
def test_a_value_carries_the_tag_of_a_source_that_states_it(
    name, option, value, source
):
    assert PRESETS[name].settings[option] == (value, source)


def test_a_summary_is_said_to_be_one_where_it_is_cited():
    theta = PRESETS["vasso_resnet18_cifar10_noise75"].settings["theta"]
    assert theta == (0.2, f"{SUMMARY_2025}; it says 'high label noise'")
    chosen = PRESETS["evasso_resnet18_cifar10"].settings["probability"]
    assert chosen == (0.3, f"{SUMMARY_2025}; it names no network")


def test_no_source_is_cited_for_a_method_of_this_project():
    for name, preset in PRESETS.items():
        if name.startswith("lagged_vasso"):
            for option, (_, source) in preset.settings.items():
                assert source == OURS or option in CHOSEN


def test_no_statement_is_without_a_preset_that_it_is_the_source_of():
    cited = {source for p in PRESETS.values() for _, source in p.settings.values()}
    assert {statement.source for statement in STATEMENTS} <= cited


def test_options_change_a_preset_and_the_name_says_so():
    given = ["--preset", "vasso_resnet18_cifar10", "--data-dir", "x", "--rho", "0.2"]
    options = vision_options.parse_arguments(given)
    assert options.hyperparameters == {"rho": 0.2, "theta": 0.4}
    assert cifar.run_name(options) == "vasso_resnet18_cifar10_rho=0.2"
    # Another method has its own hyperparameters, not those of the preset's.
    options = vision_options.parse_arguments([*given[:4], "--method", "friendly_sam"])
    assert options.hyperparameters == {"rho": 0.2, "sigma": 1.0, "lmbda": 0.6}
    lagged = ["--preset", "lagged_vasso_resnet18_cifar10", *given[2:4]]
    assert vision_options.parse_arguments(lagged).recollect == 40
    assert vision_options.parse_arguments([*lagged, "--method", "sam"]).recollect == 0
    smoke = vision_options.parse_arguments([*given, "--smoke"])
    assert cifar.run_name(smoke) == "vasso_resnet18_cifar10_rho=0.2_smoke"


def test_a_report_has_what_is_published_beside(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--preset", "vasso_resnet18_cifar10", "--data-dir", "x"]
    settings = cifar.settings(vision_options.parse_arguments(given))
    for seed, accuracies in enumerate([(96.0, 95.0), (97.0, 97.0), (50.0, 10.0)]):
        result = {
            "name": given[1],
            "preset": given[1],
            "changed": {},
            "seed": seed,
            "settings": settings,
            "interrupted": seed == 2,
            "epochs": [
                {"epoch": i + 1, "test_accuracy": accuracy, "gradients": 2.0}
                for i, accuracy in enumerate(accuracies)
            ],
        }
        Path(f"run_seed{seed}.json").write_text(json.dumps(result))
    assert cifar.main(["--report", "."]) == 0
    assert "1 interrupted" in capsys.readouterr().out
    text = Path("report.md").read_text()
    row = next(line for line in text.splitlines() if given[1] in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Last epochs 95 and 97, best 96 and 97; standard errors |difference|/2.
    assert cells[:6] == [
        *(given[1], "VaSSO, ρ = 0.1, θ = 0.4", "2"),
        *("96.00 ± 1.00", "96.50 ± 0.50", "2.00"),
    ]
    assert cells[6] == "96.77 (within 0.03)"
    assert "BingcongLi/VaSSO" in cells[7]
