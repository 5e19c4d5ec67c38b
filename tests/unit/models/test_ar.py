"""The autoregressive transformer: its laws, Qwen3 as a reference, and its numbers (spec step-video-arlon-dpo B4, F-B 2, 4)."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from videofm import models
from videofm.errors import CheckpointError, ConfigError, DataError, ParallelError
from videofm.models import ParallelOptions
from videofm.models.ar import ADAPTER, flatten, parallelize, unflatten
from videofm.models.ar.parallelize import TENSOR_TABLE, TEXT_TENSOR_TABLE
from videofm.models.flops import flops_per_sample
from videofm.ops.rope import head_split
from videofm.parallel.tensor import matches, weight_shards
from videofm.types import Conditioning

TEXTS = ("cross_attention", "prefix")
SHAPE, VOCAB, CHANNELS, NUM_TEXT = (3, 2, 4), 40, 12, 5
LENGTH = 24


def build(text="cross_attention", **overrides):
    """A small model with weights large enough for every path to matter."""
    sizes = {"vocab_size": VOCAB, "num_layers": 2, "width": 32, "num_heads": 2, "caption_channels": CHANNELS}
    model = models.build("ar/transformer", "tiny", text=text, **{**sizes, **overrides}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def conditioning(num_texts=2, num_tokens=NUM_TEXT):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(num_tokens) < torch.tensor([[2], [num_tokens]])[:num_texts]
    return Conditioning(torch.randn(num_texts, num_tokens, CHANNELS, generator=generator), mask)


def indices(shape=SHAPE, batch_size=2):
    return torch.randint(0, VOCAB, (batch_size, *shape), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_of(model, ids, text=None, start="start"):
    inputs = model.inputs_of(ids, start)
    return model(inputs.tokens, inputs.positions, inputs.cells, text or conditioning())


@torch.no_grad()
def cached_logits(model, ids, chunks, text=None):
    """Logits of consecutive chunks of these lengths, each after the cache of those before."""
    inputs, cache, found, first = model.inputs_of(ids), None, [], 0
    for length in chunks:
        span = slice(first, first + length)
        begin = (text or conditioning()) if cache is None else None
        step = model.forward_cached(inputs.tokens[:, span], inputs.positions[:, span], inputs.cells[:, :, span], begin, cache)
        cache, first = step.cache, span.stop
        found.append(step.logits)
    assert first == ids[0].numel() == cache.num_tokens
    return torch.cat(found, dim=1)


# --- sizes -------------------------------------------------------------------------------------------------------------------


def test_parameters_of_every_size():
    """By `ARConfig.num_parameters`, whose docstring derives it. For 300m, d = 1024, h = 2048, k = 64, c = 4096, V = 2048:

    a block 2 (4 d^2 + d + 2 k) + 3 d h + d = 14,683,392, of which 24; embeddings (V + 2 + 64 + 64) d = 2,230,272; head V d =
    2,097,152; last norm, text's norm and projection d + c + c d = 4,199,424.
    """
    block = 2 * (4 * 1024**2 + 1024 + 2 * 64) + 3 * 1024 * 2048 + 1024
    by_hand = 24 * block + 2178 * 1024 + 2048 * 1024 + 1024 + 4096 + 4096 * 1024
    assert by_hand == 360_928_256
    wanted = {"tiny": 248_832, "300m": by_hand, "1b": 1_074_134_016}
    assert models.sizes("ar/transformer") == list(wanted)
    for size, count in wanted.items():
        model = models.build("ar/transformer", size, device="meta")
        assert sum(parameter.numel() for parameter in model.parameters()) == model.config.num_parameters == count, size


@pytest.mark.parametrize("options", [{"text": "prefix"}, {"tied_head": True}, {"hidden_width": 100}])
def test_parameters_of_other_options(options):
    model = models.build("ar/transformer", "tiny", device="meta", **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.num_parameters != 248_832


@pytest.mark.parametrize("text", TEXTS)
def test_a_layer_and_the_head_cost_what_pytorch_counts(text):
    """A whole model of one layer, forward and backward. PyTorch counts full squares where attention is causal: `n (n - 1) / 2`
    pairs more, at 3 * 4 d, with n tokens of the sequence.
    """
    model = build(text, num_layers=1)
    parallelize(model, None, ParallelOptions(attention="math", cross_attention="math"))
    ids, states = indices(batch_size=1), conditioning(1)
    inputs, d = model.inputs_of(ids), model.config.width
    with FlopCounterMode(display=False) as counter:
        model(inputs.tokens, inputs.positions, inputs.cells, states).sum().backward()
    n = LENGTH + (NUM_TEXT if text == "prefix" else 0)
    extra = 3 * 4 * d * n * (n - 1) // 2
    assert counter.get_total_flops() - extra == flops_per_sample(model, LENGTH, NUM_TEXT)


# --- where training starts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize(("width", "vocab_size"), [(64, 256), (1024, 2048)])
def test_a_fresh_model_finds_all_tokens_as_likely(text, tied_head, width, vocab_size):
    """The loss is within 5 % of log V, also of a wide model (F-B 4)."""
    torch.manual_seed(0)
    options = {"hidden_width": 64, "num_layers": 1, "caption_channels": CHANNELS}
    model = models.build(
        "ar/transformer", "tiny", text=text, tied_head=tied_head, width=width, vocab_size=vocab_size, **options
    )
    ids = torch.randint(0, vocab_size, (2, 2, 4, 4))
    loss = cross_entropy(logits_of(model, ids).flatten(0, 1), flatten(ids).flatten())
    assert float(loss) == pytest.approx(math.log(vocab_size), rel=0.05)


def test_depth_does_not_widen_the_stream():
    """The last layers of sub-layers shrink with their number: 12 layers leave the stream within a tenth of that of 3."""
    spread = {}
    for num_layers in (3, 12):
        torch.manual_seed(0)
        model = models.build("ar/transformer", "tiny", num_layers=num_layers, vocab_size=VOCAB, caption_channels=CHANNELS)
        seen = []
        model.out_norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].std().item()))
        logits_of(model, indices())
        spread[num_layers] = seen[0]
    assert spread[12] == pytest.approx(spread[3], rel=0.1)


# --- laws --------------------------------------------------------------------------------------------------------------------


def test_raster_order():
    """Width is fastest; a prefix of frames is a prefix of tokens; there and back again is the identity (F-B 2)."""
    ids = torch.arange(24).view(1, *SHAPE)
    assert flatten(ids).tolist() == [list(range(24))]
    assert torch.equal(unflatten(flatten(indices()), SHAPE), indices())
    assert torch.equal(flatten(indices())[:, :16], flatten(indices()[:, :2]))
    with pytest.raises(DataError, match=r"23 tokens do not fill a grid of 3x2x4, which has 24"):
        unflatten(torch.zeros(1, 23), SHAPE)


def test_inputs_are_the_tokens_before():
    model, ids = build(), indices()
    inputs = model.inputs_of(ids, ["start", "continue"])
    assert inputs.tokens[:, 0].tolist() == [VOCAB, VOCAB + 1] == [model.start_token, model.continue_token]
    assert torch.equal(inputs.tokens[:, 1:], inputs.targets[:, :-1]) and torch.equal(inputs.targets, flatten(ids))
    assert inputs.positions[0].tolist() == list(range(24))
    assert inputs.cells[1, :, 13].tolist() == [1, 1]  # 13 = 1 * 8 + 1 * 4 + 1: frame, row, column
    places = model.places(SHAPE, 2)
    assert torch.equal(places.cells, inputs.cells) and torch.equal(places.span(3, 7).positions, inputs.positions[:, 3:7])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("place", [0, 11, 22])
def test_a_token_changes_only_what_follows(text, place):
    """Logits at places up to j do not see token j, bit for bit; the place after it does (F-B 4)."""
    model, ids = build(text), indices()
    changed = flatten(ids).clone()
    changed[:, place] = (changed[:, place] + 1) % VOCAB
    before, after = logits_of(model, ids), logits_of(model, unflatten(changed, SHAPE))
    assert torch.equal(before[:, : place + 1], after[:, : place + 1])
    assert (before[:, place + 1] - after[:, place + 1]).abs().amax() > 1e-3


@pytest.mark.parametrize("text", TEXTS)
def test_how_a_window_begins_matters(text):
    model = build(text)
    begun, inside = logits_of(model, indices()), logits_of(model, indices(), start=["start", "continue"])
    assert torch.equal(begun[0], inside[0]) and (begun[1] - inside[1]).abs().amax() > 1e-2


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("chunks", [[1] * 24, [8, 8, 8], [5, 1, 17, 1], [24]])
def test_cached_logits_are_those_of_one_pass(text, chunks):
    """Chunks of one and of several tokens, with texts of two lengths (F-B 4)."""
    model = build(text)
    torch.testing.assert_close(cached_logits(model, indices(), chunks), logits_of(model, indices()), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("text", TEXTS)
def test_a_cache_is_a_value(text):
    """Two ways to go on from one cache do not disturb each other."""
    model = build(text)
    one, other = (model.inputs_of(ids) for ids in (indices(), (indices() + 1) % VOCAB))
    cache = model.empty_cache(conditioning())

    def step(inputs, first, end, cache):
        span = slice(first, end)
        return model.forward_cached(inputs.tokens[:, span], inputs.positions[:, span], inputs.cells[:, :, span], None, cache)

    begun = step(one, 0, 8, cache).cache
    first = step(one, 8, 24, begun).logits
    assert not torch.equal(step(other, 8, 24, begun).logits, first)
    assert torch.equal(step(one, 8, 24, begun).logits, first) and cache.num_tokens == 0 and begun.num_tokens == 8


@pytest.mark.parametrize("text", TEXTS)
def test_padding_of_the_text_changes_nothing(text):
    """Neither what stands in it nor how much there is of it; the real text does matter."""
    model, ids, states = build(text), indices(), conditioning()
    noise = torch.where(states.mask[..., None], states.embeddings, 100 * torch.ones(()))
    longer = torch.cat([noise, torch.full((2, 3, CHANNELS), -7.0)], dim=1)
    mask = torch.cat([states.mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    expected = logits_of(model, ids, states)
    for other in (Conditioning(noise, states.mask), Conditioning(longer, mask)):
        torch.testing.assert_close(logits_of(model, ids, other), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(cached_logits(model, ids, [9, 1, 14], other), expected, rtol=0, atol=1e-5)
    real = Conditioning(states.embeddings + states.mask[..., None], states.mask)
    assert ((logits_of(model, ids, real) - expected).abs().amax(dim=(1, 2)) > 1e-2).all()


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_without_a_real_token_gives_numbers(text):
    states = Conditioning(conditioning().embeddings, torch.zeros(2, NUM_TEXT, dtype=torch.bool))
    model = build(text)
    expected = logits_of(model, indices(), states)
    assert expected.isfinite().all()
    torch.testing.assert_close(cached_logits(model, indices(), [4, 20], states), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_only_distances_between_positions_count():
    """A common offset of all positions changes no logit; another distance does."""
    model, inputs, text = build(), build().inputs_of(indices()), conditioning()
    expected = model(inputs.tokens, inputs.positions, inputs.cells, text)
    moved = model(inputs.tokens, inputs.positions + 1000, inputs.cells, text)
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-4)
    stretched = model(inputs.tokens, inputs.positions * 2, inputs.cells, text)
    assert (stretched - expected).abs().amax() > 1e-2


@pytest.mark.parametrize("text", TEXTS)
def test_rows_and_columns_count(text):
    """The same tokens in the same order, as another grid, are something else."""
    model, flat = build(text), flatten(indices())
    assert (logits_of(model, flat.view(2, 3, 2, 4)) - logits_of(model, flat.view(2, 3, 4, 2))).abs().amax() > 1e-2


@pytest.mark.parametrize("text", TEXTS)
def test_recomputed_blocks_have_the_same_gradients(text):
    gradients = []
    for mode in ("none", "full", "selective"):
        model = build(text)
        parallelize(model, None, ParallelOptions(activation_checkpointing=mode))
        inputs = model.inputs_of(indices())
        model(inputs.tokens, inputs.positions, inputs.cells, conditioning()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("text", TEXTS)
def test_every_backend_gives_the_same(text):
    expected = logits_of(build(text), indices())
    for backend in ("math", "sdpa"):
        model = build(text)
        parallelize(model, None, ParallelOptions(attention=backend, cross_attention="math"))
        torch.testing.assert_close(logits_of(model, indices()), expected, rtol=0, atol=1e-5)


# --- a reference -------------------------------------------------------------------------------------------------------------


def channels_of_qwen(head_width):
    """Which channel of a head of Qwen3 stands at each channel of ours. There i is paired with i + K / 2; here the two halves of
    each axis of `head_split` are paired, and frequencies fall in the order of the pairs."""
    order, first = [], 0
    for num_channels in head_split(head_width):
        half = num_channels // 2
        order += [*range(first, first + half), *range(head_width // 2 + first, head_width // 2 + first + half)]
        first += half
    return torch.tensor(order)


@torch.no_grad()
@pytest.mark.parametrize("tied_head", [False, True])
def test_without_text_it_is_qwen3(tied_head):
    """Attention to the text, rows and columns are switched off; embeddings, norms, rotation, SwiGLU and head remain."""
    model = build(num_heads=2, width=32, theta=1e4, tied_head=tied_head, hidden_width=48)
    for block in model.blocks:
        block.cross_attention.out.weight.zero_()
    model.row_embed.weight.zero_()
    model.column_embed.weight.zero_()
    config = Qwen3Config(
        vocab_size=VOCAB + 2, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=model.config.norm_eps, tie_word_embeddings=False,
        attention_bias=False, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, attn_implementation="eager",
    )  # fmt: skip
    qwen = Qwen3ForCausalLM(config).eval()
    qwen.load_state_dict(as_qwen(model), strict=True)
    inputs = model.inputs_of(indices(), "continue")
    expected = qwen(inputs.tokens).logits[..., :VOCAB]
    assert expected.std() > 0.3
    found = model(inputs.tokens, inputs.positions, inputs.cells, conditioning())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def as_qwen(model):
    """The weights of a model under the names of Qwen3, heads in its order of channels."""
    order, k = channels_of_qwen(model.config.head_width).argsort(), model.config.head_width
    rows = torch.cat([order + head * k for head in range(model.config.num_heads)])
    head = model.token_embed.weight[:VOCAB] if model.head is None else model.head.weight
    weights = {
        "model.embed_tokens.weight": model.token_embed.weight,
        "model.norm.weight": model.out_norm.weight,
        "lm_head.weight": torch.cat([head, torch.zeros(2, head.shape[1])]),
    }
    for index, block in enumerate(model.blocks):
        q, k_, v = block.self_attention.qkv.weight.chunk(3)
        layer = {
            "self_attn.q_proj": q[rows],
            "self_attn.k_proj": k_[rows],
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.self_attention.out.weight,
            "self_attn.q_norm": block.self_attention.q_norm.weight[order],
            "self_attn.k_norm": block.self_attention.k_norm.weight[order],
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.feed_forward_norm.weight,
            "mlp.gate_proj": block.feed_forward.gate.weight,
            "mlp.up_proj": block.feed_forward.up.weight,
            "mlp.down_proj": block.feed_forward.down.weight,
        }
        weights |= {f"model.layers.{index}.{name}.weight": value for name, value in layer.items()}
    return weights


# --- stored ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_stored_and_loaded_it_is_the_same(text, tmp_path):
    model = build(text, tied_head=text == "prefix")
    models.save_public(model, tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(logits_of(loaded.eval(), indices()), logits_of(model, indices()))
    with pytest.raises(CheckpointError, match=r"decoder\.weight is not a tensor of this model"):
        ADAPTER.from_public({"decoder.weight": torch.zeros(1)})


# --- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads 5 does not divide the width 64"),
        ({"num_heads": 16}, "head_width 4: rotary positions .* take a multiple of 8"),
        ({"vocab_size": 0}, "vocab_size 0 of ar/transformer must be at least 1"),
        ({"hidden_width": 0}, "hidden_width 0 must be at least 1, or null"),
        ({"text": "suffix"}, "text is 'suffix'; ar/transformer takes it by cross_attention or as a prefix"),
    ],
)
def test_configs_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        models.config("ar/transformer", "tiny", **options)


def test_arguments_that_do_not_fit():
    model, inputs, text = build(), build().inputs_of(indices()), conditioning()
    good = (inputs.tokens, inputs.positions, inputs.cells)
    with pytest.raises(DataError, match=r"tokens have shape \(2, 24\) and type torch.float32; \(B, L\) of int64"):
        model(inputs.tokens.float(), *good[1:], text)
    with pytest.raises(DataError, match=r"positions has shape \(2, 23\); \(2, 24\) goes with tokens"):
        model(inputs.tokens, inputs.positions[:, 1:], inputs.cells, text)
    with pytest.raises(DataError, match=r"cells has shape \(2, 1, 24\); \(2, 2, 24\) goes with"):
        model(*good[:2], inputs.cells[:, :1], text)
    with pytest.raises(DataError, match=r"embeddings has shape \(1, 5, 12\); \(2, 5, 12\) is expected"):
        model(*good, conditioning(1))
    with pytest.raises(DataError, match="conditioning with clip_embeddings: ar/transformer takes the text of one encoder"):
        model(*good, Conditioning(text.embeddings, text.mask, torch.zeros(2, 3, 8)))
    with pytest.raises(DataError, match=r"indices have shape \(2, 3, 2, 4\) and type torch.float32; .* whole numbers"):
        model.inputs_of(indices().float())
    with pytest.raises(DataError, match=r"indices have shape \(2, 3, 2, 4, 2\).* those of one codebook"):
        model.inputs_of(indices()[..., None].repeat(1, 1, 1, 1, 2))
    with pytest.raises(DataError, match="a grid of 17 rows x 2 columns of tokens; .* has embeddings for 16 x 16"):
        model.inputs_of(indices((1, 17, 2)))
    with pytest.raises(DataError, match="a grid of 2 rows x 17 columns"):
        model.places((1, 2, 17), 1)
    with pytest.raises(ConfigError, match=r"start is 'begin': give `start` or `continue`"):
        model.inputs_of(indices(), "begin")
    with pytest.raises(ConfigError, match=r"one for each of the 2"):
        model.inputs_of(indices(), ["start"])


def test_numbers_without_an_embedding():
    """40 tokens and two more, 16 rows and 16 columns: the last of each is taken, the next and -1 are named. On a GPU, for which
    the meta device stands here, nothing is looked at: the host would wait."""
    model, text = build(), conditioning()
    size = model.config.vocab_size
    inputs = model.inputs_of(indices())
    text_of_one = (
        rf"embeddings for 0 to {size + 1}: a vocabulary of {size}, then start_token and continue_token.*larger vocab_size"
    )
    for place, last, name, message in (
        (None, size + 1, "tokens", text_of_one),
        (0, 15, "rows in cells", "embeddings for 0 to 15: build it with larger max_rows, or take smaller clips"),
        (1, 15, "columns in cells", "embeddings for 0 to 15: build it with larger max_columns"),
    ):
        for value in (last, last + 1, -1):
            tokens, cells = inputs.tokens.clone(), inputs.cells.clone()
            (tokens if place is None else cells[:, place])[1, 3] = value
            if value == last:
                assert model(tokens, inputs.positions, cells, text).isfinite().all()
                continue
            span = f"{min(value, 0)} to" if value < 0 else f"to {value}"
            with pytest.raises(DataError, match=rf"{name} from .*{span}.*{message}"):
                model(tokens, inputs.positions, cells, text)
            with pytest.raises(DataError, match=rf"{name} from "):
                model.forward_cached(tokens, inputs.positions, cells, text)
    for value in (-1, size):
        ids = indices()
        ids[1, 2, 1, 3] = value  # the last one, which `forward` does not see
        with pytest.raises(
            DataError, match=rf"token ids from .*{value}.* vocabulary of {size}, ids 0 to {size - 1}: .* another"
        ):
            model.inputs_of(ids)
        assert model.inputs_of(ids.to("meta")).targets.is_meta


def test_caches_that_do_not_fit():
    model, inputs = build(), build().inputs_of(indices())
    good = (inputs.tokens, inputs.positions, inputs.cells)
    with pytest.raises(DataError, match="forward_cached needs a text .* to begin with, or the `cache`"):
        model.forward_cached(*good, None)
    with pytest.raises(DataError, match="tokens of 2 samples with a cache of 1"):
        model.forward_cached(*good, None, model.empty_cache(conditioning(1)))
    with pytest.raises(DataError, match=r"a text of shape \(2, 7\) with a cache of one of \(2, 5\)"):
        model.forward_cached(*good, conditioning(2, 7), model.empty_cache(conditioning()))
    with pytest.raises(DataError, match="a cache holds its text; pass None"):
        model.forward_cached(*good, conditioning(), model.empty_cache(conditioning()))


class TwoContextRanks:
    """A mesh whose groups cannot be asked for: the refusal comes before."""

    context_degree, tensor_degree = 2, 1


def test_a_prefix_is_not_split_over_context_ranks():
    with pytest.raises(ParallelError, match=r"context_degree is 2, but this ar/transformer takes the text as a prefix"):
        parallelize(build("prefix"), TwoContextRanks())


@pytest.mark.parametrize("text", TEXTS)
def test_every_parameter_is_split_over_tensor_ranks_or_replicated_on_purpose(text):
    """Replicated are embeddings, head, the projection of the text and every norm; of 300m they are 3 %."""
    model = models.build("ar/transformer", "300m", device="meta", text=text)
    table = TENSOR_TABLE + (TEXT_TENSOR_TABLE if text == "cross_attention" else ())
    split = {f"{name}.{key}" for name, line in matches(model, table).items() for key in weight_shards(line, 2)}
    whole = ("token_embed", "row_embed", "column_embed", "caption_projection", "caption_norm", "out_norm", "head")
    for name, _ in model.named_parameters():
        replicated = name.startswith(whole) or name.endswith("norm.weight")
        assert (name in split) != replicated, name
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if name in split)
    assert count > 0.96 * model.config.num_parameters


class ThreeTensorRanks:
    """A mesh of tensor ranks whose group cannot be asked for."""

    context_degree, tensor_degree, tensor_rank = 1, 3, 0


def test_heads_are_not_torn_apart():
    with pytest.raises(ParallelError, match=r"tensor_degree 3 does not divide the 2 heads of ARTransformer.* It can be 1, 2\."):
        parallelize(build(), ThreeTensorRanks())
