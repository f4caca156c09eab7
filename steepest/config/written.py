"""What was written where a number, a truth value or null was read: the text of `3.10`, `007`, `1e5`, `yes`.

A key that takes text gets the text: `trainer.experiment_name=3.10` is another run than `3.1`, though the number is one.
Overrides and YAML files are read twice, by Hydra and OmegaConf as they are, and by the classes here, in which each such
value stays a string. Strings, lists, mappings and interpolations are the same in both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

_SCHEME = "written"


def override_text(override: str) -> Any:
    """The value of an override that Hydra's grammar can read, with what was written in place of what was read."""
    from hydra.core.override_parser import overrides_parser as hydra
    from hydra.core.override_parser.overrides_visitor import HydraOverrideVisitor

    class WrittenVisitor(HydraOverrideVisitor):
        def _createPrimitive(self, ctx: Any) -> Any:
            found = super()._createPrimitive(ctx)
            return ctx.getText().strip() if found is None or isinstance(found, int | float) else found

        def visitFunction(self, ctx: Any) -> Any:
            if ctx.getChild(0).getText() == "str":
                return super().visitFunction(ctx)
            return HydraOverrideVisitor(self.functions).visitFunction(ctx)  # the others compute with numbers

    lexer = hydra.OverrideLexer(hydra.InputStream(override))
    tree = hydra.OverrideParser(hydra.CommonTokenStream(lexer)).override()
    return WrittenVisitor(_functions()).visit(tree).value()


@functools.cache
def _functions() -> Any:
    """What an override may call, such as `str(1.0)`."""
    from hydra.core.override_parser.overrides_parser import create_functions

    return create_functions()


def read_yaml(text: str) -> tuple[Any, Any]:
    """A YAML text as OmegaConf reads it, and with what was written. Raises YAMLError."""
    return yaml.load(text, Loader=get_yaml_loader()), yaml.load(text, Loader=_yaml_loader())


@functools.cache
def _yaml_loader() -> Any:
    """OmegaConf's loader, with which a plain `3.10` stays "3.10". A value that is left empty is null."""
    loader: Any = type("WrittenLoader", (get_yaml_loader(),), {})
    for name in ("int", "float", "bool", "null"):
        loader.add_constructor(f"tag:yaml.org,2002:{name}", lambda self, node: self.construct_scalar(node) or None)
    return loader


@contextmanager
def written_folder(folder: Path) -> Iterator[None]:
    """Within the block Hydra composes the YAML files of `folder` with what was written in them."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    _register_source()
    before = GlobalHydra.instance().hydra
    path = create_config_search_path(search_path_dir=f"{_SCHEME}://{folder}")
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2(task_name="app", config_search_path=path)
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = before


@functools.cache
def _register_source() -> None:
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra.core.plugins import Plugins
    from hydra.plugins.config_source import ConfigResult

    class WrittenSource(FileConfigSource):
        @staticmethod
        def scheme() -> str:
            return _SCHEME

        def load_config(self, config_path: str) -> ConfigResult:
            found = super().load_config(config_path)
            file = Path(self.path, self._normalize_file_name(config_path))
            written = yaml.load(file.read_text(encoding="utf-8"), Loader=_yaml_loader())
            if isinstance(written, dict):  # Hydra's own lines keep their types
                written |= {name: found.config[name] for name in ("defaults", "hydra") if name in found.config}
                found.config = OmegaConf.create(written)
            return found

    Plugins.instance().register(WrittenSource)
