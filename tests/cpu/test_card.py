"""The model card: the hub's own library reads back what was written, and the base model's licence is kept."""

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from vllm_flatquant.calibration.card import add_results, check_card
from vllm_flatquant.calibration.errors import UserError
from vllm_flatquant.calibration.quantize import quantize
from vllm_flatquant.calibration.recipe import make_recipe

RECIPE = make_recipe(samples=2, seq_len=16, epochs=0, scheme="w4a8", kv=8)


def make(model, calib, out):
    return quantize(model, out, RECIPE, str(calib), "cpu")


def test_metadata_reads_back_and_the_body_says_what_a_user_needs(model, calib, tmp_path):
    out = make(model, calib, tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "model"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "vllm"
    assert {"flatquant", "w4a8-kv8", "4-bit"} <= set(data["tags"])
    assert "license" not in data
    # The front matter alone, through YAML, is the same mapping: what the hub does with it.
    front = (out / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front) == data
    for part in ("vllm serve", "--update-card", "torch ", "transformers ", "Python 3", "8-bit keys"):
        assert part in card.text
    block = card.text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == yaml.safe_load((out / "recipe.yaml").read_text())


def test_the_licence_is_carried_over(model, calib, tmp_path):
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: LICENSE\n---\n# base\n"
    )
    (model / "LICENSE").write_text("do as you like")
    out = make(model, calib, tmp_path / "out")
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "tiny-licence")
    assert (out / data["license_link"]).read_text() == "do as you like"


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", "no front matter", "---\nlicense: 3\n---\n"])
def test_an_odd_card_of_the_base_model_does_no_harm(model, calib, tmp_path, card):
    (model / "README.md").write_text(card)
    out = make(model, calib, tmp_path / "out")
    assert "license" not in ModelCard.load(out / "README.md").data.to_dict()


def result(value, name="text.txt"):
    return EvalResult(
        task_type="text-generation",
        dataset_type=name,
        dataset_name=name,
        metric_type="perplexity",
        metric_name="perplexity",
        metric_value=value,
        metric_args={"windows": 3, "unquantized": 1.5},
    )


def test_results_replace_their_own_and_keep_the_others(model, calib, tmp_path):
    out = make(model, calib, tmp_path / "out")
    add_results(out, [result(2.0)])
    add_results(out, [result(4.0, "other.txt"), result(3.0)])
    card = ModelCard.load(out / "README.md")
    assert {(r.dataset_name, r.metric_value) for r in card.data.eval_results} == {
        ("text.txt", 3.0),
        ("other.txt", 4.0),
    }
    assert "| text.txt | perplexity | 3.0000 | 1.5000 |" in card.text
    assert "2.0000" not in card.text
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == []


def test_a_card_of_ones_own_gets_a_section(model, calib, tmp_path):
    out = make(model, calib, tmp_path / "out")
    (out / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    add_results(out, [result(2.0)])
    card = ModelCard.load(out / "README.md")
    assert card.text.index("# mine") < card.text.index("## Accuracy") < card.text.index("2.0000")
    assert card.data.license == "mit"


def test_a_card_that_cannot_be_written(model, calib, tmp_path, monkeypatch):
    out = make(model, calib, tmp_path / "out")
    before = (out / "README.md").read_text()
    (out / ".README.md.new").mkdir()  # what writes the new card finds its place taken
    with pytest.raises(UserError, match=r"README\.md cannot be written \(Is a directory\)"):
        add_results(out, [result(2.0)])
    assert (out / "README.md").read_text() == before
    check_card(out)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="leave out --update-card"):
        check_card(out)


def test_no_card_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no README\.md"):
        add_results(tmp_path, [result(2.0)])
