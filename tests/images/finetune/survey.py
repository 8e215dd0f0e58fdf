"""A CSV file of the shape of New Zealand's annual enterprise survey, with its dependencies but invented values."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

COLUMNS = (
    "Year",
    "Industry_aggregation_NZSIOC",
    "Industry_code_NZSIOC",
    "Industry_name_NZSIOC",
    "Units",
    "Variable_code",
    "Variable_name",
    "Variable_category",
    "Value",
    "Industry_code_ANZSIC06",
)
ROWS = 55_621
YEARS = tuple(range(2024, 2012, -1))

VARIABLES = (
    ("H01", "Total income", "Financial performance", "Dollars (millions)"),
    ("H04", "Sales, government funding, grants and subsidies", "Financial performance", "Dollars (millions)"),
    ("H05", "Interest, dividends and donations", "Financial performance", "Dollars (millions)"),
    ("H07", "Non-operating income", "Financial performance", "Dollars (millions)"),
    ("H08", "Total expenditure", "Financial performance", "Dollars (millions)"),
    ("H09", "Interest and donations", "Financial performance", "Dollars (millions)"),
    ("H10", "Indirect taxes", "Financial performance", "Dollars (millions)"),
    ("H11", "Depreciation", "Financial performance", "Dollars (millions)"),
    ("H12", "Salaries and wages paid", "Financial performance", "Dollars (millions)"),
    ("H13", "Redundancy and severance", "Financial performance", "Dollars (millions)"),
    ("H14", "Salaries and wages to self employed commission agents", "Financial performance", "Dollars (millions)"),
    ("H19", "Purchases and other operating expenses", "Financial performance", "Dollars (millions)"),
    ("H20", "Non-operating expenses", "Financial performance", "Dollars (millions)"),
    ("H21", "Opening stocks", "Financial performance", "Dollars (millions)"),
    ("H22", "Closing stocks", "Financial performance", "Dollars (millions)"),
    ("H23", "Surplus before income tax", "Financial performance", "Dollars (millions)"),
    ("H24", "Total assets", "Financial position", "Dollars (millions)"),
    ("H25", "Current assets", "Financial position", "Dollars (millions)"),
    ("H26", "Fixed tangible assets", "Financial position", "Dollars (millions)"),
    ("H29", "Other assets", "Financial position", "Dollars (millions)"),
    ("H30", "Total equity and liabilities", "Financial position", "Dollars (millions)"),
    ("H31", "Shareholders funds or owners equity", "Financial position", "Dollars (millions)"),
    ("H32", "Current liabilities", "Financial position", "Dollars (millions)"),
    ("H33", "Other liabilities", "Financial position", "Dollars (millions)"),
    ("H34", "Total income per employee count", "Financial ratios", "Dollars"),
    ("H35", "Surplus per employee count", "Financial ratios", "Dollars"),
    ("H36", "Current ratio", "Financial ratios", "Percentage"),
    ("H37", "Quick ratio", "Financial ratios", "Percentage"),
    ("H39", "Return on equity", "Financial ratios", "Percentage"),
    ("H40", "Return on total assets", "Financial ratios", "Percentage"),
    ("H41", "Liabilities structure", "Financial ratios", "Percentage"),
)

_DIVISIONS = (
    ("AA", "Agriculture, Forestry and Fishing", "A"),
    ("BB", "Mining", "B"),
    ("CC", "Manufacturing", "C"),
    ("DD", "Electricity, Gas, Water and Waste Services", "D"),
    ("EE", "Construction", "E"),
    ("FF", "Wholesale Trade", "F"),
    ("GH", "Retail Trade and Accommodation", "G"),
    ("II", "Transport, Postal and Warehousing", "I"),
    ("JJ", "Information Media and Telecommunications", "J"),
    ("KK", "Financial and Insurance Services", "K"),
    ("LL", "Rental, Hiring and Real Estate Services", "L"),
    ("MN", "Professional and Administrative Services", "M"),
    ("OO", "Public Administration and Safety", "O"),
    ("PP", "Education and Training", "P"),
    ("QQ", "Health Care and Social Assistance", "Q"),
    ("RS", "Arts, Recreation and Other Services", "R"),
)
_PRODUCTS = ("Food", "Textile", "Wood", "Paper", "Metal", "Machinery", "Transport", "Furniture", "Property")
_ACTIVITIES = ("Growing", "Support Services", "Product Manufacturing", "Wholesaling", "Operation", "Repair")


def write_survey(path: Path, rows: int = ROWS, seed: int = 0) -> Path:
    """Write the first `rows` rows in a random order that depends on `seed`, and return the path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(COLUMNS)
        writer.writerows(itertools.islice(_rows(random.Random(seed)), rows))
    return path


def industries() -> list[tuple[str, str, str, str]]:
    """Aggregation level, code, name and ANZSIC06 groups of 150 industries on three levels."""
    found = [
        ("Level 1", "99999", "All industries", "ANZSIC06 divisions A-S (excluding classes K6330, L6711 and O7552)")
    ]
    for index, (code, name, letter) in enumerate(_DIVISIONS):
        found.append(("Level 1", code, name, f"ANZSIC06 division {letter}"))
        for group in range(1, 4):
            product = _PRODUCTS[(index + 3 * group) % len(_PRODUCTS)]
            groups = f"ANZSIC06 groups {letter}{index:02}{group} and {letter}{index:02}{group + 1}"
            activity = _ACTIVITIES[(index * 5 + group) % len(_ACTIVITIES)]
            found.append(("Level 3", f"{code}{group}1", f"{name.split(',')[0]}: {product} {activity}", groups))
        for part in range(1, 7):
            activity = _ACTIVITIES[(index + part) % len(_ACTIVITIES)]
            product = _PRODUCTS[(2 * index + part) % len(_PRODUCTS)]
            groups = f"ANZSIC06 groups {letter}{index:02}{part}, {letter}{index:02}{part + 1}"
            classes = f"(excluding class {letter}{index:02}{part}0)"
            found.append(
                (
                    "Level 4",
                    f"{code}{part}2{part}",
                    f"{name.split()[0]} {product} {activity} {part}",
                    f"{groups} {classes}",
                )
            )
    return found[: -(-ROWS // (len(YEARS) * len(VARIABLES)))]


def _rows(generator: random.Random) -> Iterator[tuple[str | int, ...]]:
    cells = list(itertools.product(YEARS, industries(), VARIABLES))
    generator.shuffle(cells)
    for year, (level, code, industry, groups), (variable, name, category, units) in cells:
        value = _value(generator, units)
        yield (year, level, code, industry, units, variable, name, category, value, groups)


def _value(generator: random.Random, units: str) -> str:
    """A number with separators for thousands; S (suppressed) and C (confidential) hide some of them."""
    if (hidden := generator.random()) < 0.06:
        return "S" if hidden < 0.02 else "C"
    if units == "Percentage":
        return str(round(generator.gauss(60, 45)))
    return f"{round(generator.lognormvariate(6.5 if units.endswith('(millions)') else 11, 2)):,}"
