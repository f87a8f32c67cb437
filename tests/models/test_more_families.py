"""Families laid out as another, models of images and text, activations that only a config names."""

import pytest
import torch

import ffmerge_fast as ff
from ffmerge_fast.models import families

transformers = pytest.importorskip("transformers")
TEXT = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=80,
    max_position_embeddings=64,
)
GROUPED = TEXT | {"num_key_value_heads": 2}
IMAGE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
)
ALIKE = {
    **dict.fromkeys(("mpnet", "deberta", "ernie", "megatron-bert", "data2vec-text", "layoutlm"), {}),
    "deberta-v2": {"relative_attention": False},
    "longformer": {"attention_window": [8] * 3},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roformer": {"embedding_size": 32},
    "dinov2": IMAGE | {"num_hidden_layers": 3, "mlp_ratio": 2},
    "vit_mae": IMAGE | {"num_hidden_layers": 3, "decoder_hidden_size": 32, "decoder_num_attention_heads": 4},
}


@pytest.mark.parametrize("name", ALIKE)
def test_layouts_that_are_alike(name):
    values = ALIKE[name] if "image_size" in ALIKE[name] else TEXT | ALIKE[name]
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **values))
    found = ff.find_ffns(model)
    assert [(f.stack, f.index, f.d_ff, f.activation) for f in found] == [("encoder", i, 64, "gelu") for i in range(3)]


def test_the_config_names_an_activation_that_no_module_beside_up_is(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    ff.register_family("bert", ff.FFNSpec("encoder.layer", "intermediate.dense", "output.dense", stack="encoder"))
    config = transformers.BertConfig(**TEXT, hidden_act="gelu_new")
    model = transformers.BertModel(config)
    for layer in model.encoder.layer:
        del layer.intermediate.intermediate_act_fn
    assert {f.activation for f in ff.find_ffns(model)} == {"gelu_tanh"}


def _llava():
    vision = transformers.CLIPVisionConfig(**IMAGE)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GROUPED), vision_config=vision, image_token_id=79
    )
    return transformers.LlavaForConditionalGeneration(config)


def _mistral3():
    vision = transformers.PixtralVisionConfig(**IMAGE)
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**GROUPED), vision_config=vision, image_token_id=79
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def _qwen():
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}
    vision = dict(depth=2, hidden_size=32, num_heads=4, intermediate_size=64, out_hidden_size=32, patch_size=4)
    config = transformers.Qwen2_5_VLConfig(text_config=GROUPED | {"rope_scaling": rope}, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _paligemma():
    vision = transformers.SiglipVisionConfig(**IMAGE)
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**GROUPED, head_dim=8),
        vision_config=vision,
        projection_dim=32,
        image_token_id=79,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _gemma3():
    vision = transformers.SiglipVisionConfig(**IMAGE)
    text = transformers.Gemma3TextConfig(**GROUPED, head_dim=8)
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, image_token_id=79)
    )


@pytest.mark.parametrize("make", [_llava, _mistral3, _qwen, _paligemma, _gemma3], ids=lambda make: make.__name__)
def test_the_language_model_of_images_and_text(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    assert [f.path for f in ff.find_ffns(model)] == [f"model.language_model.layers.{i}" for i in range(3)]
    ff.merge_(model, ff.plan(layers="1-2", method="average", model=model))
    ff.save_pretrained(model, tmp_path / "out")
    loaded = ff.from_pretrained(tmp_path / "out")
    assert ff.shared_groups(loaded) == [("decoder", (1, 2))] and ff.verify(tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
