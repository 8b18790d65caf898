"""The bounds of scripts/measure_code.py hold, and it notices what passes them."""

from __future__ import annotations

from scripts import measure_code


def test_the_code_is_within_its_bounds(capsys):
    status = measure_code.main()

    assert status == 0, capsys.readouterr().out


def test_what_passes_a_bound_is_named(monkeypatch, capsys):
    monkeypatch.setattr(measure_code, "FUNCTION_LINES", 20)

    assert measure_code.main() == 1
    assert "configs/shapes.py:14 get_config" in capsys.readouterr().out


def test_words_are_counted_outside_code():
    assert measure_code.rate(["The codec draws `whole` pictures."]) == 1000 * 3 / 4
    assert measure_code.rate(["The image codec renders frames."]) == 0


def test_a_copy_is_named_once_at_its_first_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_code, "ROOT", tmp_path)
    copied = [f"x{number} = {number}" for number in range(7)]
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("\n".join(["import os", *copied, "y = 1"]))
    other.write_text("\n".join(["z = 2", *copied[:3], "# a comment", "", *copied[3:], "import os"]))

    assert measure_code.copies([one, other]) == ["one.py:2 = other.py:2"]
    one.write_text("\n".join(copied[:5]))
    assert measure_code.copies([one, other]) == []
