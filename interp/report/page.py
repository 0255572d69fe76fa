"""From sections to one self-contained page: plotly's script once, a parquet for every figure."""

import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment
from plotly.offline import get_plotlyjs
from tqdm.auto import tqdm

from interp.files import write_atomically, write_json
from interp.model.hooked import HookedModel
from interp.report.plan import Plan
from interp.report.sections import Figure, Section, Study, sections
from interp.runs import Run
from interp.tasks.prompts import describe

N_SECTIONS = 4


def write(model: HookedModel, out: str | Path, plan: Plan = Plan(), *, resume: bool = True) -> Path:
    """Run the plan on `model` and write `out/report.html`; returns its path.

    Every stage keeps its results in a folder of `out`, so that a killed report goes on where it
    stopped; every figure's numbers are in `out/figures/NAME.parquet`.

    Raises:
        RunError: `out` can't be written, or holds a report of another model or plan.
        PlanError: No needle fits into the model's context window.
    """
    began, plan, out = time.monotonic(), plan.fitted(model), Path(out)
    run = Run.open(out, {"analysis": "report", "plan": asdict(plan), **model.provenance()}, resume)
    study = Study(model, plan, out, resume)
    done = []
    with tqdm(total=N_SECTIONS, desc="report", unit="section") as bar:
        for section in sections(study):
            done.append(section)
            for figure in section.figures:
                keep(figure, out / "figures")
            bar.update()
    facts = facts_of(study, time.monotonic() - began)
    page = out / "report.html"
    html = render(model.name, done, facts)
    write_atomically(page, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    write_json(out / "facts.json", facts)
    run.finish(**study.scores.metadata["counts"])
    return page


def render(name: str, done: list[Section], facts: dict) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        files("interp.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        name=name, sections=done, facts=facts, script=get_plotlyjs(), draw=draw, flat=flat
    )


def draw(figure: Figure) -> str:
    """A figure as HTML that uses the page's script."""
    return figure.figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=figure.name,
        config={"displaylogo": False, "responsive": True},
    )


def flat(facts: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as rows of a table."""
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key} ")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def keep(figure: Figure, folder: Path) -> None:
    """The numbers behind a figure, as parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{figure.name}.parquet", lambda path: figure.table.to_parquet(path))


def facts_of(study: Study, seconds: float) -> dict:
    """Where the numbers come from."""
    sets = {"needles": study.prompts, "fresh needles": study.fresh, "texts": study.texts}
    described = {name: describe(data) for name, data in sets.items()}
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": round(seconds / 60, 1),
        **study.model.provenance(),
        "plan": asdict(study.plan),
        "tokens": described["needles"]["tokens"],
        "sha256 of the data": {name: about["sha256"] for name, about in described.items()},
    }
