"""Messages that tell a user of the losses what to write instead."""

import pytest
import torch

import fastcl


@pytest.mark.parametrize("name, meant", (
    ("simclr", "ntxent"), ("SimCLR", "ntxent"), ("infonce", "ntxent"), ("info_nce", "ntxent"), ("NT-Xent", "ntxent"),
    ("nt_xent", "ntxent"), ("SupCon", "supcon"), ("supervised contrastive", "supcon"), ("nscll", "nscl"),
))  # fmt: skip
def test_an_unknown_objective_suggests_the_one_that_is_meant(name, meant):
    z = torch.zeros(2, 3)
    with pytest.raises(fastcl.FastclError, match=rf"unknown objective '{name}'; did you mean '{meant}'\?$"):
        fastcl.contrastive_loss(z, torch.tensor([0, 0]), objective=name)
    with pytest.raises(fastcl.FastclError, match=r"'crossentropy'; (?!did you mean 'ce')"):  # only the trainer has it
        fastcl.contrastive_loss(z, torch.tensor([0, 0]), objective="crossentropy")


def test_numpy_arrays_are_told_what_makes_them_tensors():
    z = torch.ones(2, 3)
    for arguments, name in (((z.numpy(), z), "z1"), ((z, z.numpy()), "z2")):
        with pytest.raises(fastcl.FastclError, match=f"{name} must be a tensor, got ndarray; .* torch.from_numpy"):
            fastcl.ntxent_loss(*arguments)
    with pytest.raises(fastcl.FastclError, match=r"labels must be an integer tensor, got ndarray; .* torch.from_numpy"):
        fastcl.nscl_loss(z, z, torch.tensor([0, 1]).numpy())


@pytest.mark.parametrize("options, message", (
    ({"temperature": 0.0}, "temperature must be a positive number"), ({"reduction": "avg"}, "reduction must be"),
    ({"objective": "nscll"}, "did you mean 'nscl'"),
))  # fmt: skip
def test_compilers_repeat_what_is_wrong(options, message):
    torch._dynamo.reset()
    loss = torch.compile(fastcl.contrastive_loss, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="Dynamo") as caught:
        loss(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), **options)
    assert message in str(caught.value).replace("\\'", "'")


def test_an_error_shows_what_cannot_be_displayed_escaped():
    assert str(fastcl.FastclError("a\x00b\ncaf\udce9")) == "a\\x00b\ncaf\\xe9"
