"""A module measures each claim of what only alignment can do: `measure` returns figures, and whether it `holds`."""
