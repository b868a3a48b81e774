"""`pytest benchmarks`: what is left out on a small machine, and the line that says so."""

from __future__ import annotations

import pytest

from benchmarks.stage import takes_long

LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_addoption(parser):
    parser.addoption("--all-shapes", action="store_true", help="benchmarks: those shapes, too, that take long on a CPU")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("benchmarks/ needs pytest-benchmark, which is not there; pip install pytest-benchmark")


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items):
    """Leave out what takes long, unless it is asked for by -k, by the id of a test or by --all-shapes."""
    named = any("::" in argument for argument in config.args)
    if config.getoption("--all-shapes") or config.option.keyword or named:
        return
    given = {item: item.callspec.params for item in items if _is_benchmark(item)}
    slow = [item for item, x in given.items() if takes_long(x["case"], item.module.DEVICE, x["variant"])]
    if slow:
        config.stash[LEFT_OUT] = [given[item]["case"].shape.name for item in slow]
        config.hook.pytest_deselected(items=slow)
        left_out = set(slow)
        items[:] = [item for item in items if item not in left_out]


def _is_benchmark(item) -> bool:
    return hasattr(item, "callspec") and "case" in item.callspec.params and hasattr(item.module, "DEVICE")


def pytest_terminal_summary(terminalreporter, config):
    names = config.stash.get(LEFT_OUT, [])
    if names:
        shapes = list(dict.fromkeys(names))
        more = f" and {len(shapes) - 3} more shapes" if len(shapes) > 4 else ""
        terminalreporter.write_line(
            f"Left out: {len(names)} benchmarks that take over some seconds each on a CPU, those of large shapes and "
            f"the compiled peers of tiny ones. Pass -k {names[-1]} for those of one shape, or --all-shapes. "
            f"They are of {', '.join(shapes[:3] if more else shapes)}{more}."
        )
