"""`lora-ggpo methods`."""

from __future__ import annotations

from lora_ggpo.cli.output import print_table


def command() -> None:
    """List the methods that `lora-ggpo compare` knows."""
    from lora_ggpo.methods.table import GROUPS, METHODS
    from lora_ggpo.report.tables import rows_table

    rows = [
        [
            method.name,
            method.title,
            method.source,
            ", ".join(
                [f"{k}={v}" for k, v in method.settings.items()]
                + [f"{k} × {some[0]:g}" for k, some in method.factors.items()]
            ),
        ]
        for method in METHODS
    ]
    print_table(rows_table(["name", "method", "arXiv", "settings"], rows))
    for name, members in GROUPS.items():
        print(f"--methods {name} is {','.join(members)}")
