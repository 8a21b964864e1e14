"""What a run publishes is found from the run's folder and from the folder itself."""

from __future__ import annotations

from pathlib import Path

from dptune.published import published_model, published_part


def test_the_part_of_a_run_that_may_be_published_is_found(tmp_path: Path) -> None:
    assert published_part(tmp_path) == tmp_path
    (tmp_path / "publish").mkdir()
    assert published_part(tmp_path) == published_part(tmp_path / "publish") == tmp_path / "publish"
    assert published_part(tmp_path / "publish" / "lora_weights.bin") == tmp_path / "publish" / "lora_weights.bin"


def test_a_whole_model_is_found_and_other_names_stay(tmp_path: Path) -> None:
    for name in ("meta-llama/Llama-2-7b-hf", "./folder/", str(tmp_path)):
        assert published_model(name) == name
    (tmp_path / "publish").mkdir()
    assert published_model(str(tmp_path)) == str(tmp_path)  # an adapter is no model
    (tmp_path / "publish" / "config.json").touch()
    assert published_model(str(tmp_path)) == str(tmp_path / "publish")
