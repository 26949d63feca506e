"""Reading and writing weights. Files are read as tensors; no code in them is ever run.

A file that does not fit its model is refused with a one-line message that says why.
"""

import hashlib
import typing
import warnings
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from .files import write_whole


class TorchScript(ValueError):
    """The file is a TorchScript archive, which contains code."""


def read_weights(path):
    """The dict that torch.save wrote to a file.

    Raises FileNotFoundError, or ValueError with a one-line message for any other file, including
    TorchScript archives: merely opening one of these runs its code (__setstate__).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of weights at {path}")
    damaged = ValueError(f"{path} is damaged, or was not written by torch.save")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except PermissionError:
        raise ValueError(f"no permission to read {path}; change its permissions") from None
    except MemoryError:
        raise
    except Exception:                    # a damaged archive fails in a dozen ways
        raise damaged from None
    if any(entry.filename.endswith("constants.pkl") for entry in entries):
        raise TorchScript(f"{path} is a TorchScript archive; it contains code and is not opened")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        if all(entry.compress_type == zipfile.ZIP_STORED for entry in entries):
            raise damaged                # its sizes contradict each other
        raise ValueError(f"{path} is compressed, which torch.save never does; it is not opened")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, "cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception:
        raise damaged from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains no dict of weights")
    return content


def read_checkpoint(path, kind):
    """The dict in a file whose "kind" is `kind`.

    Raises ValueError, with a one-line message, for any other file.
    """
    if not Path(path).is_file():
        raise ValueError(f"no {kind} file at {path}")
    saved = read_weights(path)
    if saved.get("kind") != kind:
        raise ValueError(f"{path} is not a file of kind {kind!r}")
    return saved


def save_model(path, kind, model, provenance, **more):
    """Write a model's weights in half precision with its config and provenance."""
    weights = {}
    for name, weight in model.state_dict().items():
        if weight.is_floating_point():
            weight = weight.half()
        weights[name] = weight.cpu()
    saved = dict(kind=kind, config=asdict(model.config), weights=weights, provenance=provenance)
    write_whole(path, lambda file: torch.save(saved | more, file))


def load_model(path, kind, config_class, model_class):
    """The model that `save_model` wrote, frozen, in fp32 and eval mode, and the dict it came in.

    Raises ValueError, with a one-line message, if the file does not fit.
    """
    saved = read_checkpoint(path, kind)
    try:
        config = make_config(config_class, saved.get("config"))
        model = build(lambda: model_class(config), saved.get("weights"))
    except ValueError as error:
        raise ValueError(f"{path} does not fit this version's {model_class.__name__}: {error}; "
                         "train it again") from None
    return model.requires_grad_(False), saved


def make_config(config_class, values):
    """Build a config from the dict in a file, and check that its sizes are plausible.

    A damaged file could make the model allocate all memory. Numbers must therefore have the
    declared type and lie in 0..2^20, those of layers and blocks in 0..256; tuples have at most 8
    entries, and each number of heads divides its width. Raises ValueError for anything else.
    """
    try:
        config = config_class(**values)
    except TypeError:                    # not a dict, unknown or missing fields
        raise ValueError("its config does not fit this version") from None
    types = typing.get_type_hints(config_class)
    for field in fields(config):
        value = getattr(config, field.name)
        if not is_size(field.name, value, types[field.name]):
            raise ValueError(f"its {field.name} is {str(value)[:40]}, which is out of range")
    for field in fields(config):
        if field.name.endswith("heads"):
            width = getattr(config, field.name.replace("heads", "width"))
            heads = getattr(config, field.name)
            if heads == 0 or width % heads:
                raise ValueError(f"its {field.name} is {heads}, which does not divide {width}")
    return config


def is_size(name, value, declared):
    """Does a config's value have its declared type and a size in bounds?"""
    is_bool = isinstance(value, bool)                                    # a bool is an int, too
    wants_bool = declared is bool
    if not isinstance(value, declared) or is_bool != wants_bool:
        return False
    most = 2 ** 20
    if "layers" in name or "blocks" in name:
        most = 256
    numbers = [value]
    if isinstance(value, tuple):
        numbers = value
    if not 1 <= len(numbers) <= 8:
        return False
    return all(isinstance(number, (int, float)) and 0 <= number <= most for number in numbers)


class SkipInitialisation(torch.overrides.TorchFunctionMode):
    """Skip the random initialisation of weights, which are about to be overwritten.

    On the meta device, initialising has no effect, but it makes PyTorch import its compiler, which
    takes seconds.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "").endswith("normal_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})


@torch.no_grad()
def build(make, weights):
    """The model that make() returns, with `weights` ({name: tensor}), in fp32 and in eval mode.

    make() runs on the meta device, where tensors have shapes but no memory. Raises ValueError,
    with a one-line message, if make() fails, or for the first weight that does not fit.
    """
    try:
        with torch.device("meta"), SkipInitialisation():
            model = make()
    except (MemoryError, ValueError):
        raise
    except Exception:                    # sizes that contradict each other
        raise ValueError("its config does not fit this version") from None
    if not isinstance(weights, dict):
        raise ValueError("its weights are not a dict")
    expected = model.state_dict()
    for name in weights:
        if name not in expected:
            raise ValueError(f"its weight {str(name)[:80]!r} is unknown")
    for name, weight in expected.items():
        check_weight(name, weights.get(name), weight)
    loaded = {}
    for name, weight in expected.items():
        loaded[name] = torch.empty(weight.shape, dtype=weight.dtype).copy_(weights[name])
    model.load_state_dict(loaded, assign=True)
    return model.eval()


def check_weight(name, found, expected):
    """Raise ValueError unless `found` is a dense tensor of finite numbers like `expected`."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    types = floats if expected.is_floating_point() else (expected.dtype,)
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"its weight {name!r} is missing")
    if found.shape != expected.shape:
        raise ValueError(f"its weight {name!r} has shape {tuple(found.shape)} instead of "
                         f"{tuple(expected.shape)}")
    is_dense = found.layout == torch.strided and found.device.type == "cpu"
    if not is_dense or found.dtype not in types:
        raise ValueError(f"its weight {name!r} has another type")
    if found.numel() * found.element_size() > found.untyped_storage().nbytes():
        raise ValueError(f"its weight {name!r} has less memory than its shape needs")
    if not found.to(expected.dtype).isfinite().all():
        raise ValueError(f"its weight {name!r} is NaN or infinite")


def fingerprint(tensors):
    """A hash of a dict of tensors, in 12 hexadecimal digits, by which an adapter names its base."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
