"""The one way from a module to an ensemble."""

import pytest
import small
import torch
from torch.testing import assert_close

from treeify.conversion.assemble import assemble, blank_image, trace_model
from treeify.conversion.initialize import Source, copies
from treeify.engine.packed_tensors import named_tensors
from treeify.errors import InputError, SplitError


def test_an_ensemble_is_filled_from_its_source() -> None:
    model = small.SmallNet().eval()
    hne = assemble(model, None, ["stage1:3"], copies(model), example_input=small.EXAMPLE)
    x = small.images()
    assert not hne.training
    assert_close(hne(x), model(x)[:, None].expand(-1, 3, -1))


def test_without_a_source_it_is_filled_later() -> None:
    networks = [small.SmallNet().eval() for _ in range(2)]
    hne = assemble(networks[0], None, ["input"], example_input=small.EXAMPLE)
    hne.fill(Source(lambda network: dict(named_tensors(networks[network])), by_leaf=True))
    x = small.images()
    assert_close(hne(x), torch.stack([network(x) for network in networks], 1))


def test_one_trace_serves_several_ensembles() -> None:
    model = small.SmallNet()
    traced = trace_model(model, example_input=small.EXAMPLE)
    for splits in (["stage1"], ["stage2:3"]):
        hne = assemble(model, None, splits, copies(model), traced=traced)
        assert hne.traced is traced
        assert hne.conversion.splits.names == (splits[0].partition(":")[0],)


@pytest.mark.parametrize("splits", [2, ["stage1", "stage2"], ["stage1:3", "stage2:3"]])
def test_fanouts_follow_from_the_number_of_leaves(splits: int | list[str]) -> None:
    hne = assemble(small.SmallNet(), None, splits, leaves=9, example_input=small.EXAMPLE)
    assert hne.tree.fanouts == (3, 3)


def test_a_number_of_leaves_that_fanouts_do_not_give() -> None:
    with pytest.raises(SplitError, match="8 models"):
        assemble(small.SmallNet(), None, 2, leaves=8, example_input=small.EXAMPLE)


def test_an_example_that_is_no_batch() -> None:
    with pytest.raises(InputError, match="no batch"):
        trace_model(small.SmallNet(), example_input=torch.zeros(3))


def test_a_blank_image_has_the_models_precision() -> None:
    image = blank_image(small.SmallNet().double(), (3, 8, 8))
    assert (image.shape, image.dtype) == ((1, 3, 8, 8), torch.float64)
