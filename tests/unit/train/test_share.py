"""A digest sees a single changed element, a type and a shape; of a long tensor it reads evenly spaced elements."""

import torch

from videofm.train.share import digest


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
