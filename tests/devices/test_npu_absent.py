"""Each way in which an Ascend NPU can be missing: the words, and that a run on the CPU does not suffer from it.

Broken installations are packages called torch_npu with the metadata and the entry point of the real one. Those that
change torch are imported in a process of their own, since that cannot be undone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

from steepest.devices import select_device
from steepest.errors import DeviceError
from steepest.versions import pip_install, public
from tests.support.toy_run import make_toy, toy_overrides

ROOT = Path(__file__).parents[2]
TORCH = public(torch.__version__)

NO_CANN = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')"
NO_DRIVER = "raise ImportError('libascend_hal.so: cannot open shared object file: No such file or directory')"
CONFLICT = (
    "raise RuntimeError('Two accelerators cannot be used at the same time in PyTorch: npu and cuda. You can ...')"
)
NO_CARD = """
import torch, types
torch.utils.rename_privateuse1_backend("npu")
npu = types.ModuleType("npu")
npu.is_available = lambda: False
npu.device_count = lambda: 0
torch._register_device_module("npu", npu)
torch.optim.AdamW.step = None  # as the real package, which changes torch for processes without a card too
"""


@pytest.fixture
def install(tmp_path: Path):
    """Install a torch_npu into a folder; gives the folder."""

    def make(code: str, *, version: str | None = TORCH + ".post1") -> Path:
        (tmp_path / "torch_npu").mkdir()
        (tmp_path / "torch_npu" / "__init__.py").write_text(code + "\ndef _autoload(): pass\n")
        if version is not None:
            info = tmp_path / f"torch_npu-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch-npu\nVersion: {version}\n")
            (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
        return tmp_path

    return make


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code where the folder's packages are installed, as a user without any settings of torch's."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ASCEND", "TORCH_DEVICE", "VLLM", "LD_LIBRARY"))}
    env |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What asking for the NPU answers where `install` put a package that cannot be imported."""
    for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    # set, then deleted: so the undoing takes away what the test leaves there
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.delitem(sys.modules, "torch_npu")

    def ask() -> str:
        with pytest.raises(DeviceError) as caught:
            select_device("npu")
        return str(caught.value)

    return ask


def test_the_package_is_missing(reason) -> None:
    assert reason() == (
        "device=npu: the package torch-npu is not installed; install it for your torch and CANN versions "
        f"({pip_install('npu')}), or use device=cpu."
    )


def test_cann_is_not_sourced(install, reason) -> None:
    install(NO_CANN)
    found = reason()
    assert found.startswith("device=npu: torch-npu cannot load CANN (libhccl.so), whose set_env.sh is not sourced;")
    assert "run `source /usr/local/Ascend/" in found and found.endswith("or use device=cpu.")


def test_cann_is_sourced_and_lacks_a_library(install, reason, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", str(install(NO_CANN)))
    found = reason()
    assert "CANN's set_env.sh is sourced, but libhccl.so is not in this CANN; install the whole toolkit" in found


@pytest.mark.parametrize(
    "found", ["ASCEND_OPP_PATH environment variable is not set", "ASCEND_RUNTIME_PATH : /x does not exist"]
)
def test_cann_is_found_but_not_sourced(install, reason, found: str) -> None:
    words = f"{found}. Please check whether it has been installed. If exist, please run 'source set_env.sh' in the CANN"
    install(f"raise Exception({words!r})")  # no subclass: so does the real one
    assert f"CANN's environment is not whole ({found}); run `source /usr/local/Ascend/" in reason()


def test_the_driver_is_missing(install, reason) -> None:
    install(NO_DRIVER)
    found = reason()
    assert "cannot load libascend_hal.so of the Ascend driver; install the driver, or mount /usr/local/Ascend" in found


def test_a_torch_built_for_another_accelerator(install, reason) -> None:
    install(CONFLICT)
    found = reason()
    assert "Two accelerators cannot be used at the same time in PyTorch" in found
    assert f"; pip install torch=={TORCH} --index-url https://download.pytorch.org/whl/cpu, or use" in found


def test_no_card(install) -> None:
    code = """
        import os
        from steepest.devices.backends.npu import NPUDevice
        from steepest.errors import render
        print(render(NPUDevice().availability()))
        for value in ("7", " "):
            os.environ["ASCEND_RT_VISIBLE_DEVICES"] = value
            print(render(NPUDevice().availability()))
        import torch
        del os.environ["ASCEND_RT_VISIBLE_DEVICES"]
        torch.npu.is_available = lambda: (_ for _ in ()).throw(RuntimeError("drvErr 87\\nmore"))
        print(render(NPUDevice().availability()))
        torch.npu.is_available, torch.npu.device_count = lambda: True, lambda: 1
        print(NPUDevice().availability())
    """
    done = python(textwrap.dedent(code), install(NO_CARD))
    see = "see that `npu-smi info` lists one, or use device=cpu."
    assert done.stdout.splitlines() == [
        f"torch-npu sees no card; {see}",
        f"torch-npu sees no card (ASCEND_RT_VISIBLE_DEVICES='7'); {see}",
        "ASCEND_RT_VISIBLE_DEVICES=' ' hides every card; unset it, or use device=cpu.",
        f"torch-npu sees no card: drvErr 87; {see}",
        "None",
    ], done.stderr


def test_a_torch_npu_of_another_torch_is_not_even_imported(install, reason) -> None:
    install("raise SystemExit('imported')", version="2.1.0.post3")
    assert reason() == (
        f"device=npu: torch-npu 2.1.0.post3 needs torch 2.1.0, but torch is {torch.__version__}; "
        f"pip install 'torch-npu=={TORCH}.*', or the other torch, or use device=cpu."
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "import a_package_of_cann",
            "torch-npu needs the package a_package_of_cann, which is missing; pip install a_pack",
        ),
        (
            "raise ImportError('x.so: undefined symbol: _ZN3c10')",
            "torch-npu does not load (x.so: undefined symbol: _ZN3c10)",
        ),
        (
            "raise RuntimeError('Initialize failed\\nmore')",
            "torch-npu refused to load (Initialize failed); see that it fits",
        ),
    ],
)
def test_what_else_can_go_wrong_is_told_in_its_own_words(install, reason, code: str, words: str) -> None:
    install(code)
    found = reason()
    assert words in found and found.endswith("or use device=cpu.")


RUN = """
import sys
from steepest.process.entry import run_entry
from steepest.trainer.main_ppo import main
sys.exit(run_entry(main, {argv!r}))
"""


@pytest.mark.parametrize(("code", "device"), [(NO_CANN, None), pytest.param(NO_CARD, "cpu", marks=pytest.mark.slow)])
def test_a_broken_torch_npu_does_not_touch_a_run_on_the_cpu(
    install, tmp_path: Path, code: str, device: str | None
) -> None:
    folder = install(code)
    more = ["trainer.total_training_steps=1", "trainer.val_before_train=False", "trainer.test_freq=-1"]
    argv = toy_overrides(make_toy(tmp_path / "toy", num_rows=128), tmp_path / "run", *more)
    argv = [word for word in argv if word != "trainer.device=cpu"] + ([f"trainer.device={device}"] if device else [])
    done = python(RUN.format(argv=argv), folder)
    assert done.returncode == 0, done.stderr
    assert "steps       1 in" in done.stdout
    said = next(line for line in done.stdout.splitlines() if line.startswith("  device "))
    if device is None:  # what was passed over is said, with the reason
        assert "trainer.device is unset: the best device present; no cuda:" in said
        assert "no npu: there is no Ascend card here (no /dev/davinci0))" in said
    else:
        assert "trainer.device=cpu)" in said


@pytest.mark.slow
def test_without_steepest_the_same_package_breaks_torch_and_transformers(install) -> None:
    """The tests above prove something only where this holds."""
    folder = install(NO_CANN)
    assert "Failed to load the backend extension: torch_npu" in python("import torch", folder).stderr
    code = "import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\nfrom transformers import PreTrainedModel"
    assert "libhccl.so: cannot open shared object file" in python(code, folder).stderr


@pytest.mark.slow
def test_a_program_that_imports_steepest_first_is_safe_too(install) -> None:
    code = "import steepest.core.batch\nimport steepest.models.load, torch, transformers\nprint(torch.zeros(2).sum())"
    done = python(code, install(NO_CANN))
    assert done.returncode == 0 and "tensor(0.)" in done.stdout, done.stderr


def test_a_value_of_the_users_own_wins(install) -> None:
    code = "import steepest, os; print(os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])"
    assert python(code, install(NO_CANN), TORCH_DEVICE_BACKEND_AUTOLOAD="1").stdout.strip() == "1"
