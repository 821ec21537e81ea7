"""The README's Python runs as it stands, top to bottom."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_readmes_python_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    exec("\n".join(blocks), names)
    assert "trainable parameters" in capsys.readouterr().out
    results = names["results"]
    assert len(results) == 8 and not any(row.error for row in results)
    assert all(row.losses[-10:].mean() < row.losses[:10].mean() for row in results)
