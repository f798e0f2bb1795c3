"""How an adapter names its base, for whoever opens it without us."""

from adapters_kit.artifacts.source import portable_base


def test_a_base_below_the_current_folder_is_named_from_there(tmp_path, monkeypatch):
    """So that plain transformers, started in the same place, finds it; elsewhere the adapter's own folder counts."""
    base = tmp_path / "project" / "models" / "base"
    base.mkdir(parents=True)
    out = tmp_path / "project" / "runs" / "x" / "adapter"
    monkeypatch.chdir(tmp_path / "project")
    assert portable_base(str(base), out, here_first=True) == "models/base"
    assert portable_base("models/base", out, here_first=True) == "models/base"
    assert portable_base(str(base), out) == "../../../models/base"
    monkeypatch.chdir(tmp_path.parent)
    assert portable_base("org/base", out, here_first=True) == "org/base"
