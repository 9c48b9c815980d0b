"""Writes a file of sales to report on: `python make_sales.py data/sales.csv [rows]`. The same rows each time."""

import csv
import random
import sys
from datetime import date, timedelta
from pathlib import Path

COLUMNS = ["date", "region", "product", "quantity", "amount"]
REGIONS = ["north", "east", "south", "west"]
PRICES = {"tea": 325, "coffee": 410, "cocoa": 385, "teapot": 2450, "cup": 690}  # cents


def make_sales(path: Path, rows: int = 5_000) -> None:
    chance = random.Random(7)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for _ in range(rows):
            day = date(2025, 1, 1) + timedelta(days=chance.randrange(365))
            product = chance.choice(list(PRICES))
            quantity = chance.randint(1, 12)
            cents = quantity * PRICES[product]
            region = chance.choice(REGIONS)
            writer.writerow([day, region, product, quantity, f"{cents // 100}.{cents % 100:02d}"])


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "data/sales.csv")
    make_sales(target, int(sys.argv[2]) if len(sys.argv) > 2 else 5_000)
    print(f"wrote {target}")
