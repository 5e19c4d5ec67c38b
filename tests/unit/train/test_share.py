"""A digest sees a single changed element, a type and a shape; of a long tensor it reads evenly spaced elements."""

import torch

from videofm import models
from videofm.train.share import _describe, digest, held_tensors
from videofm.types import Batch


def test_equal_things_have_equal_digests() -> None:
    video = torch.randn(2, 3, 4, 5)
    assert digest(video) == digest(video.clone()) == digest(video.transpose(0, 1).contiguous().transpose(0, 1))
    assert digest(["a red circle", "ü"]) == digest(["a red circle", "ü"])
    assert digest(torch.empty(0)) == digest(torch.empty(0))


def test_different_things_have_different_digests() -> None:
    video = torch.randn(100)
    moved = video.clone()
    moved[-1] = torch.nextafter(moved[-1], torch.tensor(torch.inf))
    found = [
        digest(thing)
        for thing in (video, moved, video.double(), video.view(10, 10), video.bfloat16(), video > 0, [1], ["1"], None, 1)
    ]
    assert len(set(found)) == len(found) and all(0 <= value < 2**63 for value in found)


def test_a_long_tensor_is_sampled() -> None:
    """Of 200,000 elements every fourth: 65,536 would need every 3.05th."""
    long = torch.zeros(200_000)
    for index, seen in ((0, True), (4, True), (5, False), (199_996, True)):
        other = long.clone()
        other[index] = 1
        assert (digest(other) != digest(long)) is seen, index


def test_tokens_are_told_as_integers() -> None:
    """The other ranks make room by what is told: type and shape of each tensor, and which fields hold none."""
    video, fps, indices = torch.zeros(2, 3, 0, 0, 0), torch.ones(2), torch.full((2, 3, 4, 5), 2**40)
    told = _describe(Batch(video, ["a", "b"], fps, ["0", "1"], 0, 2, indices=indices))
    assert told["tensors"]["indices"] == ("int64", [2, 3, 4, 5], [0, 1, 2, 3])
    assert set(told["tensors"]) == {"video", "fps", "indices"}
    assert told["values"]["rollouts"] is None and told["values"]["latents"] is None


def test_frames_are_told_in_the_order_of_their_memory() -> None:
    """As decoded, `(B, T, H, W, 3)`: permuted so they are contiguous, and go to the other ranks without a copy."""
    video = torch.zeros(2, 5, 4, 6, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    dtype, shape, order = _describe(Batch(video, ["a", "b"], torch.ones(2), ["0", "1"], 0, 2))["tensors"]["video"]
    assert (dtype, shape, order) == ("uint8", [2, 3, 5, 4, 6], [0, 2, 3, 4, 1])
    assert video.permute(order).is_contiguous() and video.permute(order).data_ptr() == video.data_ptr()


def test_what_is_compared_are_parameters_and_stored_buffers() -> None:
    """The book of `vq_ema` is a buffer: with what it follows by, it is among them, and so are parameters, themselves."""
    tokenizer = models.build("arlon/tokenizer", "tiny", quantizer={"kind": "vq_ema", "codebook_size": 16, "dim": 4})
    held = held_tensors({"tokenizer": tokenizer, "vae": torch.nn.Linear(2, 2)}, ("tokenizer",))
    assert held["tokenizer.quantizer.books"] is tokenizer.quantizer.books
    assert {"tokenizer.quantizer.sums", "tokenizer.quantizer.counts", "tokenizer.quantizer.counters"} <= held.keys()
    assert all(held[f"tokenizer.{name}"] is parameter for name, parameter in tokenizer.named_parameters())
    assert not any(name.startswith("vae") for name in held)
    before = digest(held["tokenizer.quantizer.books"])
    with torch.no_grad():
        tokenizer.quantizer.books[0, 3, 2] += 1e-3
    assert digest(held["tokenizer.quantizer.books"]) != before
