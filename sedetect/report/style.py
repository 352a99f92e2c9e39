"""Colors of the report, by role. The page names them as CSS variables, so that one drawing serves light, dark and
print; figures that leave the page take the light ones."""

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1b1f24",
    "muted": "#59636e",
    "line": "#d5dae1",
    "proved": "#c0262d",
    "candidate": "#9a5b00",
    "undecided": "#6f42a8",
    "refuted": "#2a7d5f",
    "other": "#6b8fb5",
    "accent": "#1f5fa8",
    "unseen": "#c9ced6",
    "broken": "#000000",
}
DARK = {
    "paper": "#14171b",
    "panel": "#1d2127",
    "ink": "#e8eaed",
    "muted": "#a3acb8",
    "line": "#363d47",
    "proved": "#ff7b72",
    "candidate": "#e3a33c",
    "undecided": "#c09af0",
    "refuted": "#5cc49c",
    "other": "#6286ad",
    "accent": "#79b8ff",
    "unseen": "#4a515c",
    "broken": "#ffffff",
}
VARIABLES = {name: f"var(--{name})" for name in LIGHT}
PAGE_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
FIGURE_FONT = "Liberation Sans, Arial, sans-serif"


def css_variables(colors: dict[str, str]) -> str:
    """The colors as CSS declarations."""
    return " ".join(f"--{name}: {value};" for name, value in colors.items())
