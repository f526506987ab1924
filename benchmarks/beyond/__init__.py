"""What only alignment can do: a module for each claim, whose `measure` returns its figures and whether it `holds`."""
