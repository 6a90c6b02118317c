"""Write the day's HTML report and rebuild the Data Docs of the data-quality results."""

from __future__ import annotations

import argparse

from jobs.command import main, parser
from leadre_lib.quality import build_data_docs
from leadre_lib.report import write_report
from leadre_lib.settings import Settings
from leadre_lib.sources import open_source


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Build both and say where they are."""
    notes = [] if settings.source == "lake" else open_source(settings).notes
    print(f"Data Docs: {build_data_docs(settings)}")
    print(f"report: {write_report(settings, args.ds, notes)}")


if __name__ == "__main__":
    main(run, parser(__doc__))
