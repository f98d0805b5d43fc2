"""Other language models than Vicuna: tokenizers of byte pairs, ChatML, GGUF files, `python -m published smollm2`."""

import json
import re
import shutil

import pytest
import tokenizers
import torch
import transformers
from helpers import randomise
from test_llama import FAMILY, SIZES, generated_strings

from prompts import END, System, Turn, dialog_source, uas_texts
from published.__main__ import main
from published.byte_pairs import chatml
from published.convert import chat_form
from published.gguf_file import smollm_tokenizer
from published.loading import WeightsError
from published.parts import load_llama, load_tokenizer

TEMPLATE = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_pairs() -> dict:
    """A tokenizer.json of SmolLM's kind: three special tokens, 256 bytes and 41 merges, 300 tokens in all."""
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(
        ["the kite drifts to the right ### and the boat ### is on the sea in the small city"] * 9, trainer
    )
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(pair) for pair in model["merges"]]
    return smollm_tokenizer(tokens, [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)), merges)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small SmolLM2 as Hugging Face publishes it."""
    folder = tmp_path_factory.mktemp("published")
    sizes = SIZES | FAMILY["smollm2"] | {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
    reference = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    reference.save_pretrained(folder, max_shard_size="200kB")
    (folder / "tokenizer.json").write_text(json.dumps(byte_pairs()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("weights")
    assert main(["convert", str(folder), "--out", str(out)]) == 0
    return out / "vicuna"


def with_config(folder, target, **change):
    target.mkdir()
    values = json.loads((folder / "config.json").read_text()) | change
    (target / "config.json").write_text(json.dumps(values))
    shutil.copyfile(folder / "tokenizer.json", target / "tokenizer.json")
    return target


# ---- the tokenizer


def test_ids_are_those_of_transformers(converted):
    ours = load_tokenizer(converted)
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(converted / "tokenizer.json"))
    added = [transformers.AddedToken(n, lstrip=True, rstrip=True, special=True, normalized=False) for n in ours.added]
    reference.add_special_tokens({"additional_special_tokens": added})
    ours.in_chat_form = str  # the strings hold Vicuna's marks, too
    strings = [text + end for text in generated_strings(500, seed=1) for end in ("", "<|im_end|>", " <|im_start|> a")]
    strings = [s for s in strings if not re.search("[\x1c-\x1f]", s)]  # white space in Python and not in Rust
    wrong = [s for s in strings if ours.encode(s) != reference.encode(s, add_special_tokens=False)]
    print(f"{len(strings)} strings, {len(wrong)} encoded otherwise")
    assert not wrong, wrong[:3]
    plain = [s for s in strings if not any(name in s for name in ours.added)]
    wrong = [s for s in plain if ours.decode(ours.encode(s)) != ours.special_pattern.sub("", s)]
    assert len(plain) > 100 and not wrong, wrong[:3]


def test_interface(converted):
    tokenizer = load_tokenizer(converted, vokens=3)
    assert (tokenizer.base_vocabulary, tokenizer.vocabulary, tokenizer.voken_ids) == (300, 304, [300, 301, 302])
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("a <ImageHere> b", 3).count(tokenizer.image_id) == 3
    for text in ("draw [IMG0] and <ImageHere>", "<|im_end|><|im_start|>system", "<|endoftext|>"):
        assert not set(tokenizer.encode(tokenizer.escape(text))) & set(tokenizer.special.values())
    assert tokenizer.ends(tokenizer.encode("the end." + END)) and not tokenizer.ends(tokenizer.encode("the end."))
    assert tokenizer.decode(tokenizer.encode("the end." + END)) == "the end."


def test_vicunas_form_with_byte_pairs(folder, tmp_path):
    """A model without a chat form of its own is asked in Vicuna's, and its answers end with ###."""
    tokenizer = load_tokenizer(with_config(folder, tmp_path / "plain", eos_token_id=[2, 0]))
    assert tokenizer.decode(tokenizer.encode("###Human: a boat ###Assistant:")) == "###Human: a boat ###Assistant:"
    for text in ("the boat ###", "the boat###", "the boat<|im_end|>", "the boat<|endoftext|>"):
        assert tokenizer.ends(tokenizer.encode(text)), text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_form": "zephyr"}, "chat_form 'zephyr' is not supported, only vicuna or chatml"),
        ({"bos_token_id": None}, r"bos_token_id None and eos_token_id \[2\] should be special tokens of it"),
        ({"eos_token_id": "2"}, r"eos_token_id \['2'\] should be special tokens"),
        ({"eos_token_id": []}, r"eos_token_id \[\[\]\] should be special tokens"),
        ({"eos_token_id": 9}, r"bos_token_id 1 and eos_token_id \[9\] should be special tokens of it"),
    ],
)
def test_wrong_settings(folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(with_config(folder, tmp_path / "changed", **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_no_tokenizer(folder, tmp_path, content):
    target = with_config(folder, tmp_path / "broken")
    (target / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer") as error:
        load_tokenizer(target)
    assert "\n" not in str(error.value)


def test_tokenizers_of_other_kinds(folder, tmp_path):
    target = with_config(folder, tmp_path / "words")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(target / "tokenizer.json"))
    with pytest.raises(ValueError, match="only tokenizers of byte pairs are supported"):
        load_tokenizer(target)


# ---- ChatML


def test_chatml():
    """With <|im_start|>, which begins every sequence, the prompts are those of SmolLM2's published template."""
    turns = [Turn("hello."), Turn("a boat."), Turn("again!")]
    expected = (
        "system\nbe kind.<|im_end|>\n<|im_start|>user\nhello.<|im_end|>\n<|im_start|>assistant\na boat.<|im_end|>\n"
        "<|im_start|>user\nagain!<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chatml(dialog_source(turns, 3, System("be kind."))) == expected
    assert chatml("###Human: hello. ###Assistant:") == "user\nhello.<|im_end|>\n<|im_start|>assistant\n"
    assert chatml("a boat. ###") == "a boat.<|im_end|>"
    source, target = uas_texts("a red boat", 2)
    assert (chatml(source), chatml(target)) == ("a red boat", "[IMG0][IMG1]<|im_end|>")


def test_chat_form(tmp_path):
    assert chat_form(tmp_path) == "vicuna"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert chat_form(tmp_path) == "chatml"
    (tmp_path / "chat_template.jinja").write_text("### {{ message }}")
    assert chat_form(tmp_path) == "vicuna"


# ---- conversion


def test_convert_a_published_folder(folder, converted):
    config = json.loads((converted / "config.json").read_text())
    assert config["chat_form"] == "chatml" and (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert (converted / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    theirs, ours = dict(load_llama(folder).named_parameters()), dict(load_llama(converted).named_parameters())
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def write_gguf(path, folder, **change):
    """The model of `folder` as llama.cpp's convert_hf_to_gguf.py writes it, in float32."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    config, model = json.loads((folder / "config.json").read_text()), load_llama(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, change.get("architecture", "llama"))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(change.get("pre", "smollm"))
    writer.add_token_list(list(tokenizer["model"]["vocab"]))
    writer.add_token_types([3] * len(SPECIAL) + [1] * (300 - len(SPECIAL)))
    writer.add_token_merges(tokenizer["model"]["merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in model.named_parameters():
        count = heads.get(name.split(".")[-2])
        if count:  # llama.cpp's own permutation
            shape = tensor.shape
            tensor = tensor.reshape(count, 2, shape[0] // count // 2, shape[1]).swapaxes(1, 2).reshape(shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_convert_a_gguf_file(folder, converted, tmp_path):
    """Bit for bit the model that the file was made of, its tokenizer and its settings."""
    path, out = write_gguf(tmp_path / "small.gguf", folder), tmp_path / "weights"
    (out / "vicuna").mkdir(parents=True)
    (out / "vicuna" / "tokenizer.model").write_bytes(b"another model's")
    assert main(["convert", str(path), "--out", str(out)]) == 0
    ours, expected = load_llama(out / "vicuna"), dict(load_llama(converted).named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert ours.config.rms_norm_eps == pytest.approx(load_llama(converted).config.rms_norm_eps, rel=1e-7)
    tokenizer, reference = load_tokenizer(out / "vicuna"), load_tokenizer(converted)
    strings = generated_strings(50, seed=2)
    assert [tokenizer.encode(s) for s in strings] == [reference.encode(s) for s in strings]
    assert tokenizer.in_chat_form is chatml and tokenizer.special == reference.special
    llama = transformers.LlamaForCausalLM.from_pretrained(out / "vicuna")  # the folder is Hugging Face's, too
    assert all(torch.equal(parameter, expected[name]) for name, parameter in llama.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture 'qwen2' is not supported, only 'llama'"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre 'llama-bpe' is not supported, only 'smollm'"),
    ],
)
def test_other_gguf_files(folder, tmp_path, change, message):
    path = write_gguf(tmp_path / "other.gguf", folder, **change)
    with pytest.raises(WeightsError, match=message):
        main(["convert", str(path), "--out", str(tmp_path)])


def test_broken_gguf_files(folder, tmp_path):
    content = write_gguf(tmp_path / "whole.gguf", folder).read_bytes()
    path = tmp_path / "broken.gguf"
    for size in (4, 24, 100, 5000, len(content) - 4000):
        path.write_bytes(content[:size])
        with pytest.raises(WeightsError, match="no GGUF file that can be read") as error:
            main(["convert", str(path), "--out", str(tmp_path)])
        assert "\n" not in str(error.value)
