"""weights.py and convert.py: checking a folder, converting every published form, fetching from a made-up hub."""

import hashlib
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from published_files import (
    BLIP2,
    GOLDEN,
    TABLES,
    blip2_config,
    change,
    eva_file,
    golden,
    metadata_of,
    qformer_file,
    state_of,
    tensors_of,
    vicuna_shards,
)
from random_weights import write_random_weights
from safetensors.torch import load_file, save_file

from common import cli
from published import __main__ as weights
from published import check, convert, fetch
from published.convert import BLIP2_NAMES
from published.loading import WeightsError, load_trained, our_name
from published.parts import load_image_encoder, load_llama, load_minigpt5, size_mismatches
from unet import UNetConfig

VICUNA_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
UNET = "stable-diffusion/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    return write_random_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def folder(random_folder, tmp_path):
    return shutil.copytree(random_folder, tmp_path / "w")


@pytest.fixture
def command(capsys):
    """Run `weights.py` with arguments -> (exit status, standard output, standard error)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: sys.exit(weights.main([str(argument) for argument in arguments])))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return stop.value.code, captured.out, captured.err

    return call


# Check


def test_check_of_a_whole_folder(folder, command):
    status, out, err = command("check", folder)
    assert (status, err) == (0, "")
    assert "everything is there" in out
    assert ["unet", "complete"] in map(str.split, out.splitlines())
    assert "everything is there" in command("check", folder, "--hash")[1]


@pytest.mark.parametrize("part", ["vicuna", "minigpt4/llama_proj.safetensors", "stable-diffusion/tokenizer/merges.txt"])
def test_check_names_a_missing_part(folder, command, part):
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    status, out, _ = command("check", folder)
    assert status == 1
    assert f"{path}" in out and "no such file" in out.lower()
    assert any(line.endswith(("  missing", "  not right")) for line in out.splitlines())


def test_check_lists_every_wrong_tensor(folder, command):
    def spoil(tensors):
        del tensors["conv_in.bias"], tensors["conv_out.bias"]
        tensors["extra"] = torch.zeros(1)
        tensors["conv_in.weight"] = torch.zeros(3, 3)

    change(folder / UNET, spoil)
    status, out, _ = command("check", folder)
    assert status == 1
    problems = out.splitlines()[-4:]
    assert sum("is missing" in line for line in problems) == 2
    assert any("unexpected tensor extra" in line for line in problems)
    assert any("conv_in.weight has shape (3, 3), expected (32, 4, 3, 3)" in line for line in problems)


def test_check_of_a_truncated_file(folder, command):
    path = folder / UNET
    path.write_bytes(path.read_bytes()[:1000])
    status, out, _ = command("check", folder)
    assert status == 1
    assert f"{path}: not a whole safetensors file" in out


def test_check_reads_headers_only(folder, command):
    """A file of the right length whose data is a hole passes: what is not read cannot be compared."""
    path = folder / UNET
    size, header = path.stat().st_size, path.read_bytes()[: 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(size)
    assert command("check", folder)[0] == 0
    loaded = [load() for name, _, load in check.parts(folder) if "tokenizer" not in name and name != "schedule"]
    assert len(loaded) == 5 and all(p.is_meta for model in loaded for p in model.parameters())


def test_check_finds_parts_that_do_not_go_together(folder, command):
    change(folder / "minigpt4" / "llama_proj.safetensors", lambda t: t.update({k: v[:32] for k, v in t.items()}))
    config = folder / "stable-diffusion" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    status, out, _ = command("check", folder)
    assert status == 1
    assert "image encoder and vicuna do not go together: width 32 and 64" in out
    assert "prediction_type 'sample' is not supported" in out


@pytest.mark.parametrize("change", [5, -5, None])
def test_parts_of_other_sizes_are_not_put_together(folder, change):
    """A projection for a wider, a narrower language model, or one that is no matrix."""
    path = folder / "minigpt4" / "llama_proj.safetensors"
    tensors = load_file(path)
    rows = tensors["llama_proj.weight"].shape[0] + (change or 0)
    shapes = {"llama_proj.weight": (rows, tensors["llama_proj.weight"].shape[1]), "llama_proj.bias": (rows,)}
    save_file({name: torch.zeros(shape if change else ()) for name, shape in shapes.items()}, path)
    said = f"vicuna do not go together: width {rows} and 64" if change else "llama_proj"
    with pytest.raises(ValueError, match=said):
        load_minigpt5(folder)


def test_a_tokenizer_with_more_pieces_than_embeddings(folder):
    config = folder / "vicuna" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 500}))
    change(folder / "vicuna" / "model.safetensors", lambda t: t.update({name: t[name][:500] for name in VICUNA_TABLES}))
    with pytest.raises(ValueError, match="vicuna tokenizer and vicuna do not go together: vocabulary 512 and 500"):
        load_minigpt5(folder)


def test_check_finds_sizes_that_do_not_go_together():
    """Each pair of sizes gives its line; a vocabulary may have more rows than the tokenizer has pieces."""
    embeddings = SimpleNamespace(token_embedding=torch.nn.Embedding(1, 24))
    loaded = {
        "unet": SimpleNamespace(config=UNetConfig(cross_attention_dim=32, in_channels=4)),
        "text encoder": SimpleNamespace(text_model=SimpleNamespace(embeddings=embeddings)),
        "vae": SimpleNamespace(config=SimpleNamespace(latent_channels=16)),
        "vicuna tokenizer": SimpleNamespace(base_vocabulary=5),
        "vicuna": SimpleNamespace(config=SimpleNamespace(vocab_size=6)),
    }
    assert size_mismatches(loaded) == [
        "unet and text encoder do not go together: width 32 and 24",
        "unet and vae do not go together: channels 4 and 16",
    ]
    loaded = {"vicuna tokenizer": SimpleNamespace(base_vocabulary=7), "vicuna": loaded["vicuna"]}
    assert size_mismatches(loaded) == ["vicuna tokenizer and vicuna do not go together: vocabulary 7 and 6"]


def test_check_finds_another_file_of_the_published_size(folder, command, monkeypatch):
    name = "unet/diffusion_pytorch_model.safetensors"
    size, digest = (folder / UNET).stat().st_size, fetch.sha256(folder / UNET)
    monkeypatch.setitem(fetch.PUBLISHED, name, (size, digest))
    status, out, _ = command("check", folder, "--hash")
    assert status == 0 and "same hash" in out
    monkeypatch.setitem(fetch.PUBLISHED, name, (size, "0" * 64))
    status, out, _ = command("check", folder, "--hash")
    assert status == 1 and "Stable Diffusion 2.0" in out


def test_check_of_a_checkpoint(folder, command):
    assert command("convert", GOLDEN / "stage1.ckpt", "--out", folder)[0] == 0
    assert command("check", folder)[0] == 0
    change(folder / "minigpt5" / "uas.safetensors", lambda t: t.pop("fc.0.bias"))
    status, out, _ = command("check", folder)
    assert status == 1 and "tensor fc.0.bias (32,) is missing" in out


def test_check_of_a_checkpoint_over_a_missing_one(folder, command):
    path = folder / "minigpt5" / "mls-story.safetensors"
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file({"vokens.input": torch.zeros(9, 64)}, path)
    status, out, _ = command("check", folder)
    assert status == 1 and "uas.safetensors: no such file" in out and re.search(r"mls-story +not right", out)


def test_bad_usage(tmp_path, command):
    for arguments in (("check", tmp_path / "none"), ("convert", tmp_path / "none.pth", "--out", tmp_path)):
        status, _, err = command(*arguments)
        assert status == 2 and err.count("\n") == 1 and "none" in err
    assert command("convert", tmp_path)[0] == 2


# Convert


def check_golden_blip2(folder):
    found = tensors_of(folder / "vision_model.safetensors") | tensors_of(folder / "qformer.safetensors")
    eva, qformer = golden("eva_vit"), golden("blip2_qformer")
    bias = found["vision_model.encoder.layers.1.self_attn.qkv.bias"]
    expected = eva["blocks.1.attn.q_bias"], torch.zeros(48), eva["blocks.1.attn.v_bias"]
    assert torch.equal(bias.float(), torch.cat(expected).float())
    for name, source in {
        "vision_model.embeddings.class_embedding": eva["cls_token"],
        "vision_model.encoder.layers.2.self_attn.projection.weight": eva["blocks.2.attn.proj.weight"],
        "vision_model.encoder.layers.0.layer_norm2.bias": eva["blocks.0.norm2.bias"],
        "vision_model.post_layernorm.weight": qformer["ln_vision.weight"],
        "qformer.layernorm.bias": qformer["Qformer.bert.embeddings.LayerNorm.bias"],
        "qformer.encoder.layer.2.crossattention.attention.key.weight": qformer[
            "Qformer.bert.encoder.layer.2.crossattention.self.key.weight"
        ],
    }.items():
        assert torch.equal(found[name], source), name
    assert len(found) == 43 + 90 - 1 - 3  # position_ids is left out, each block's two biases become one
    config = json.loads((folder / "config.json").read_text())
    assert config == BLIP2


def minigpt4_file() -> dict[str, torch.Tensor]:
    """As released: what MiniGPT-4 trained, and the buffers of its frozen Q-Former and Vicuna."""
    frequencies = {f"llama_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    positions = {"Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}
    return positions | frequencies | golden("minigpt4_proj")


def test_convert_blip2_from_pickles(tmp_path, command):
    files = eva_file(tmp_path / "a"), qformer_file(tmp_path / "b")
    blip2_config(tmp_path / "config.json")
    assert command("convert", *files, "--out", tmp_path / "w")[0] == 0
    check_golden_blip2(tmp_path / "w" / "blip2")
    torch.save({"model": minigpt4_file(), "optimizer": {"state": {0: torch.ones(3)}}}, tmp_path / "p.pth")
    assert command("convert", tmp_path / "p.pth", "--out", tmp_path / "w")[0] == 0
    projection = tensors_of(tmp_path / "w" / "minigpt4" / "llama_proj.safetensors")
    assert torch.equal(projection["llama_proj.weight"], golden("minigpt4_proj")["llama_proj.weight"])
    assert load_image_encoder(tmp_path / "w").llama_proj.out_features == 64


def test_convert_blip2_from_safetensors_one_at_a_time(tmp_path, command):
    """The config.json in the target folder is used and kept."""
    folder = tmp_path / "w" / "blip2"
    folder.mkdir(parents=True)
    blip2_config(folder / "config.json")
    for name in ("blip2_qformer", "eva_vit"):
        assert command("convert", GOLDEN / f"{name}.safetensors", "--out", tmp_path / "w")[0] == 0
    check_golden_blip2(folder)


def test_convert_cuts_the_fortieth_block(tmp_path, command):
    file, _ = eva_file(tmp_path / "a", blocks=40), blip2_config(tmp_path / "config.json", num_hidden_layers=39)
    assert command("convert", file, "--out", tmp_path / "w", "--dtype", "bf16")[0] == 0
    found = tensors_of(tmp_path / "w" / "blip2" / "vision_model.safetensors")
    assert {int(name.split(".")[3]) for name in found if ".layers." in name} == set(range(39))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_convert_of_transformers_blip2(random_folder, tmp_path, command):
    """Shards of the whole model with its language model -> the two parts that MiniGPT-4 uses."""
    tensors = tensors_of(random_folder / "blip2" / "model.safetensors")
    names = sorted(tensors)
    source = tmp_path / "hub"
    source.mkdir()
    shards = {"a.safetensors": names[:50], "b.safetensors": names[50:], "c.safetensors": []}
    language = {"language_model.shared.weight": torch.ones(2, 2), "language_projection.weight": torch.ones(2, 2)}
    for file, held in shards.items():
        safetensors.torch.save_file({k: tensors[k] for k in held} or language, source / file)
    shutil.copyfile(random_folder / "blip2" / "config.json", source / "config.json")
    assert command("convert", source, "--out", tmp_path / "w")[0] == 0
    folder = tmp_path / "w" / "blip2"
    found = tensors_of(folder / "vision_model.safetensors") | tensors_of(folder / "qformer.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in names)


def test_without_config_the_sizes_are_the_published_ones(tmp_path, command):
    """EVA-ViT-g's, with 39 of the file's 40 blocks. Loading refuses files of other sizes."""
    torch.save({"model": golden("minigpt4_proj")}, tmp_path / "p.pth")
    files = eva_file(tmp_path / "a", blocks=40), qformer_file(tmp_path / "b"), tmp_path / "p.pth"
    assert command("convert", *files, "--out", tmp_path / "w", "--dtype", "fp32")[0] == 0
    found = tensors_of(tmp_path / "w" / "blip2" / "vision_model.safetensors")
    assert {int(name.split(".")[3]) for name in found if ".layers." in name} == set(range(39))
    with pytest.raises(WeightsError, match=r"has shape \(32,\), expected \(768,\)"):
        load_image_encoder(tmp_path / "w")


def test_convert_vicuna(tmp_path, command):
    assert command("convert", vicuna_shards(tmp_path / "v"), "--out", tmp_path / "w")[0] == 0
    folder = tmp_path / "w" / "vicuna"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = tensors_of(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        found |= tensors
    expected = {k: v for k, v in golden("vicuna").items() if not k.endswith("inv_freq")}
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    config = json.loads((folder / "config.json").read_text())
    assert [config[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")] == [512, 0, 1, 2]
    assert (folder / "tokenizer.model").is_file()


def test_vicuna_wants_all_shards_and_rows(tmp_path, command):
    source = vicuna_shards(tmp_path / "v")
    command("convert", source / "pytorch_model-00002-of-00002.bin", "--out", tmp_path / "w")
    with pytest.raises(WeightsError, match=r"vicuna: tensor .* is missing|model-00001-of-00001.* is missing"):
        load_llama(tmp_path / "w" / "vicuna")
    shutil.rmtree(source)
    command("convert", vicuna_shards(tmp_path / "v", rows=500), "--out", tmp_path / "w")
    with pytest.raises(WeightsError, match=r"has shape \(500, 64\), expected \(512, 64\)"):
        load_llama(tmp_path / "w" / "vicuna")


@pytest.mark.parametrize("with_vicuna", [False, True])
def test_convert_stage_1_keeps_changed_rows_whole(tmp_path, command, with_vicuna):
    if with_vicuna:
        command("convert", vicuna_shards(tmp_path / "v"), "--out", tmp_path)
    assert command("convert", GOLDEN / "stage1.ckpt", "--out", tmp_path)[0] == 0
    path = tmp_path / "minigpt5" / "uas.safetensors"
    found, state = tensors_of(path), state_of("stage1.ckpt")
    for table, rows, vokens in zip(
        TABLES["uas"], ("model.embed_tokens.weight", "lm_head.weight"), ("vokens.input", "vokens.output"), strict=True
    ):
        assert torch.equal(found.pop(rows), state[table][:512])
        assert torch.equal(found.pop(vokens), state[table][512:])
    assert found.keys() == state.keys() - set(TABLES["uas"])
    assert all(torch.equal(found[name], state[name]) for name in found)
    expected = {"format": "minigpt5", "stage": "uas", "vokens": "8", "source": "stage1.ckpt"}
    assert metadata_of(path) == expected


def test_convert_stage_1_leaves_out_tables_that_are_vicunas(tmp_path, command):
    command("convert", vicuna_shards(tmp_path / "v"), "--out", tmp_path)
    state, vicuna = state_of("stage1.ckpt"), golden("vicuna")
    embed, head = TABLES["uas"]
    state[embed][:512] = 0.9875 * vicuna["model.embed_tokens.weight"].float()
    state[head][:512] = vicuna["lm_head.weight"].float()
    torch.save({"state_dict": state}, tmp_path / "s.ckpt")
    assert command("convert", tmp_path / "s.ckpt", "--out", tmp_path)[0] == 0
    found = tensors_of(tmp_path / "minigpt5" / "uas.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], state[embed][:512]) and "lm_head.weight" not in found


def test_convert_stage_2_continues_stage_1(tmp_path, command):
    source = shutil.copyfile(GOLDEN / "stage2.ckpt", tmp_path / "stage2_vist.ckpt")
    status, _, err = command("convert", source, "--out", tmp_path / "w")
    assert status == 2 and "stage 1" in err and err.count("\n") == 1
    assert command("convert", source, GOLDEN / "stage1.ckpt", "--out", tmp_path / "w")[0] == 0
    path = tmp_path / "w" / "minigpt5" / "mls-vist.safetensors"
    found, first, state = tensors_of(path), state_of("stage1.ckpt"), state_of("stage2.ckpt")
    assert torch.equal(found["vokens.input"], state[TABLES["mls"][0]][512:])
    assert torch.equal(found["lm_head.weight"], state[TABLES["mls"][1]][:512])
    peft = "model.llama_model.base_model.model.model.layers.{}.self_attn.{}.lora_{}.default.weight"
    for layer in range(3):
        for linear in ("q_proj", "v_proj"):
            for matrix in "AB":
                name = f"model.layers.{layer}.self_attn.{linear}.lora_{matrix}.weight"
                assert torch.equal(found.pop(name), state[peft.format(layer, linear, matrix)])
    mapper = {name for name in found if not name.startswith(("vokens.", "model.", "lm_head."))}
    assert mapper == {name for name in first if name not in TABLES["uas"]}
    for name in mapper:
        assert torch.equal(found[name], state.get(name, first[name]))
    expected = {"format": "minigpt5", "stage": "mls", "vokens": "8", "source": source.name, "lora_alpha": "16"}
    assert metadata_of(path) == expected  # the file's name says nothing about its prompts


def test_convert_records_how_the_prompts_were_worded(tmp_path, command, monkeypatch):
    """By the file's content, whatever its name; --form goes before it."""
    one, other = (
        shutil.copyfile(GOLDEN / f"stage{n}.ckpt", tmp_path / f"{name}.ckpt") for n, name in ((1, "a"), (2, "b"))
    )
    known = {name: digest for name, (_, digest) in fetch.PUBLISHED.items() if name.endswith(".ckpt")}
    released = {name: convert.FORMS[digest] for name, digest in known.items()}
    assert released == {
        "stage1_cc3m.ckpt": "cc3m-2023", "stage2_vist.ckpt": "vist-2023", "stage2_mmdialog.ckpt": "mmdialog-2024"
    }  # fmt: skip
    opening = "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I "
    opening += "provide it to you. "
    chat = {"system": opening + "Please generate conversations with appropriate images. ", "separator": " "}
    story = {"system": opening + "Please understanding images and generate story."}

    def wording(*options) -> tuple[dict, dict]:
        status, said, err = command("convert", one, other, "--out", tmp_path / "w", *options)
        assert status == 0, err
        files = (tmp_path / "w" / "minigpt5" / name for name in ("uas.safetensors", "mls-b.safetensors"))
        keys = ("system", "separator", "first_token")
        return said.count("no released file"), *(
            {key: value for key, value in metadata_of(file).items() if key in keys} for file in files
        )

    assert wording() == (2, {}, {})
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (one, other)]
    monkeypatch.setattr(convert, "FORMS", dict(zip(digests, ("cc3m-2023", "mmdialog-2024"), strict=True)))
    assert wording() == (0, {"first_token": "</s>"}, chat | {"first_token": "<s>"})
    assert wording("--form", "ours") == (0, {}, {})
    assert wording("--form", "vist-2023") == (0, *2 * (story | {"first_token": "</s>"},))


@pytest.mark.parametrize("rows", [-1, 1])
def test_convert_refuses_other_than_nine_new_rows(tmp_path, command, rows):
    """With an old [PAD] in between, every voken would be its neighbour's row. Without Vicuna beside it, that shows when
    the checkpoint is loaded."""
    state = state_of("stage1.ckpt")
    for name in TABLES["uas"]:
        table = state[name]
        state[name] = table[:rows] if rows < 0 else torch.cat([table[:512], torch.zeros(rows, 64), table[512:]])
    torch.save({"state_dict": state}, tmp_path / "s.ckpt")
    assert command("convert", tmp_path / "s.ckpt", "--out", tmp_path / "alone")[0] == 0
    path = tmp_path / "alone" / "minigpt5" / "uas.safetensors"
    model = load_minigpt5(write_random_weights(tmp_path / "random", small=True))
    with pytest.raises(WeightsError, match=r"\.weight has shape \(51\d, 64\), expected \(512, 64\)"):
        load_trained(model, path)
    command("convert", vicuna_shards(tmp_path / "v"), "--out", tmp_path)
    status, _, err = command("convert", tmp_path / "s.ckpt", "--out", tmp_path)
    assert status == 2 and f"has {9 + rows} rows more than Vicuna, not 9: [PAD] row in between?" in err
    assert not (tmp_path / "minigpt5").exists() and err.count("\n") == 1


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_convert_refuses_what_it_does_not_know(tmp_path, command):
    torch.save({"model": {"llama_proj.weight": torch.ones(2)}, "config": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    torch.save({"resnet.weight": torch.ones(2)}, tmp_path / "other.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no tensors here")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"model": {"llama_proj.weight": torch.ones(2)}}, tmp_path / "half.pth")
    for name, said in {
        "bomb.pth": "refused",
        "other.pth": "resnet.weight",
        "list.pth": "no state dict",
        "text.pth": "neither safetensors nor",
        "empty.pth": "neither safetensors nor",
        "half.pth": "tensor llama_proj.bias is missing",
    }.items():
        status, _, err = command("convert", tmp_path / name, "--out", tmp_path / "w")
        assert status == 2 and said in err and err.count("\n") == 1, err
        assert not (tmp_path / "w").exists()
    assert not (tmp_path / "ran").exists()


def test_convert_reads_a_zip_that_was_packed_again(tmp_path, command):
    """A compressed member cannot be mapped into memory."""
    packed = tmp_path / "stage1.ckpt"
    source = zipfile.ZipFile(GOLDEN / "stage1.ckpt")
    with source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name in source.namelist():
            zipped.writestr(name, source.read(name))
    for path, out in ((packed, "a"), (GOLDEN / "stage1.ckpt", "b")):
        assert command("convert", path, "--out", tmp_path / out)[0] == 0
    one, other = (tensors_of(tmp_path / out / "minigpt5" / "uas.safetensors") for out in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_convert_reads_the_older_pickle_format(tmp_path, command):
    torch.save({"model": golden("minigpt4_proj")}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert command("convert", tmp_path / "old.pth", "--out", tmp_path / "w")[0] == 0


# Fetch: a hub of local folders, one a repository


@pytest.fixture
def hub(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    root, calls = tmp_path / "hub", []

    def hf_hub_download(repository, name, local_dir):
        calls.append((repository, name))
        source, target = root / repository / name, Path(local_dir) / name
        if not source.is_file():
            raise OSError(f"404: {repository} has no {name}")
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        return str(target.resolve())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(fetch, "PUBLISHED", {})
    return root, calls


SD1, SD2 = fetch.SOURCES["stable-diffusion"][0]


def sd_repository(random_folder, hub, name):
    folder = shutil.copytree(random_folder / "stable-diffusion", hub / name)
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / "tokenizer" / file).write_text("{}")
    return folder


def test_fetch_refuses_a_wrong_hash_and_goes_on(random_folder, tmp_path, hub, command, monkeypatch):
    root, calls = hub
    wrong = sd_repository(random_folder, root, SD1) / "unet" / "diffusion_pytorch_model.safetensors"
    right = sd_repository(random_folder, root, SD2) / "unet" / "diffusion_pytorch_model.safetensors"
    change(wrong, lambda tensors: tensors["conv_in.bias"].add_(1))
    known = (right.stat().st_size, fetch.sha256(right))
    monkeypatch.setattr(fetch, "PUBLISHED", {"unet/diffusion_pytorch_model.safetensors": known})
    monkeypatch.chdir(tmp_path)
    out = Path("w")
    status, _, err = command("fetch", out, "--parts", "stable-diffusion")
    assert status == 0 and f"{SD1}: unet/diffusion_pytorch_model.safetensors is not the published file" in err
    assert (out / UNET).read_bytes() == right.read_bytes()
    assert not any(file.is_file() for file in (out / ".fetch").glob("**/unet/*"))
    calls.clear()
    status, stdout, _ = command("fetch", out, "--parts", "stable-diffusion")
    assert status == 0 and "already there" in stdout and not calls


def test_fetch_stops_where_no_source_works(random_folder, tmp_path, hub, command, monkeypatch):
    root, _ = hub
    sd_repository(random_folder, root, SD2)
    monkeypatch.setattr(fetch, "PUBLISHED", {"unet/diffusion_pytorch_model.safetensors": (1, "0" * 64)})
    status, _, err = command("fetch", tmp_path / "w", "--parts", "stable-diffusion")
    assert status == 2 and "none of its sources works" in err and "404" in err
    assert not (tmp_path / "w" / "stable-diffusion").exists()


def test_fetch_goes_on_after_an_interruption(tmp_path, hub, command):
    """What was downloaded before the break is kept for the hub's own resuming; the part appears when it is whole."""
    root, _ = hub
    source = vicuna_shards(tmp_path / "v")
    index = {
        "weight_map": {"model.a": "pytorch_model-00001-of-00002.bin", "lm_head.b": "pytorch_model-00002-of-00002.bin"}
    }
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    shutil.copytree(source, root / "Vision-CAIR" / "vicuna-7b")
    late = root / "Vision-CAIR" / "vicuna-7b" / "pytorch_model-00002-of-00002.bin"
    late.rename(tmp_path / "late")
    out = tmp_path / "w"
    assert command("fetch", out, "--parts", "vicuna")[0] == 2
    assert not (out / "vicuna").exists()
    assert list(out.glob(".fetch/*/pytorch_model-00001-of-00002.bin"))
    (tmp_path / "late").rename(late)
    assert command("fetch", out, "--parts", "vicuna")[0] == 0
    assert (out / "vicuna" / "model.safetensors.index.json").is_file()
    assert not list(out.glob(".fetch/*"))


def test_fetch_of_the_checkpoints(tmp_path, hub, command):
    """MiniGPT-4's projection from the second mirror, BLIP-2 from the shards that hold it, both stages of MiniGPT-5."""
    root, calls = hub
    (root / "KZ-ucsc" / "MiniGPT5").mkdir(parents=True)
    for name in ("stage1_cc3m", "stage2_vist", "stage2_mmdialog"):
        shutil.copyfile(GOLDEN / f"{name.split('_')[0]}.ckpt", root / "KZ-ucsc" / "MiniGPT5" / f"{name}.ckpt")
    (root / "ckpt" / "minigpt4-7B").mkdir(parents=True)
    torch.save({"model": minigpt4_file()}, root / "ckpt" / "minigpt4-7B" / "prerained_minigpt4_7b.pth")
    blip2 = root / "Salesforce" / "blip2-flan-t5-xxl"
    blip2.mkdir(parents=True)
    blip2_config(blip2 / "config.json")
    tensors = golden("eva_vit") | golden("blip2_qformer")
    safetensors.torch.save_file(tensors, blip2 / "1.safetensors")
    weight_map = {"qformer.x": "1.safetensors", "language_model.x": "2.safetensors"}
    (blip2 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    out = tmp_path / "w"
    status, _, err = command("fetch", out, "--parts", "minigpt4", "minigpt5", "blip2")
    assert status == 0, err
    assert {file.name for file in (out / "minigpt5").iterdir()} == {
        "uas.safetensors",
        "mls-vist.safetensors",
        "mls-mmdialog.safetensors",
    }
    assert load_image_encoder(out).llama_proj.out_features == 64
    assert ("Salesforce/blip2-flan-t5-xxl", "2.safetensors") not in calls


def test_fetch_without_the_hub_package(tmp_path, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    status, _, err = command("fetch", tmp_path)
    assert status == 2 and "pip install" in err and err.count("\n") == 1


def test_known_files_have_sizes_and_whole_hashes():
    assert all(size and re.fullmatch("[0-9a-f]{64}", digest) for size, digest in fetch.PUBLISHED.values())


def test_names_of_transformers_pass_through(random_folder):
    for name in tensors_of(random_folder / "blip2" / "model.safetensors"):
        assert our_name(name, BLIP2_NAMES) == name
