"""Turns each case file into a test."""

from pathlib import Path


def pytest_generate_tests(metafunc):
    if metafunc.function.__name__ == "test_case":
        chosen = metafunc.config.getoption("--parity-dir")
        folder = Path(chosen) if chosen else Path(__file__).parent / "cases"
        cases = sorted(folder.glob("*.json"))
        assert cases, f"no cases (*.json) in {folder}"
        metafunc.parametrize("case_path", cases, ids=[path.stem for path in cases])
