"""mkdocs hook: every decision has its place under Explanation in the navigation, without a list to be kept."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    folder = Path(config.docs_dir)
    decisions = sorted(path.relative_to(folder).as_posix() for path in (folder / "decisions").glob("*.md"))
    sections = [part for part in config.nav or [] if isinstance(part, dict)]
    [explanation] = [section["Explanation"] for section in sections if "Explanation" in section]
    explanation.append({"Decisions": decisions})
    return config
