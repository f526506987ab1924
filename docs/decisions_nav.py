"""mkdocs hook: every decision has its place in the navigation, without a list to be kept."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    folder = Path(config.docs_dir)
    decisions = sorted(path.relative_to(folder).as_posix() for path in (folder / "decisions").glob("*.md"))
    config.nav = [*(config.nav or []), {"Decisions": decisions}]
    return config
