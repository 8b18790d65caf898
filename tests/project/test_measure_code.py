"""The bounds of scripts/measure_code.py hold, and it notices what passes them."""

from __future__ import annotations

from scripts import measure_code


def test_the_code_is_within_its_bounds(capsys):
    status = measure_code.main()

    assert status == 0, capsys.readouterr().out


def test_what_passes_a_bound_is_named(monkeypatch, capsys):
    monkeypatch.setattr(measure_code, "FUNCTION_LINES", 20)

    assert measure_code.main() == 1
    assert "configs/shapes.py:11 get_config" in capsys.readouterr().out


def test_words_are_counted_outside_code():
    assert measure_code.rate(["The codec draws `whole` pictures."]) == 1000 * 3 / 4
    assert measure_code.rate(["The image codec renders frames."]) == 0
