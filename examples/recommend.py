"""Will this person like this film? A text encoder that reads what they rated before, against popularity and matrix factorisation.

Ratings are sorted by time; the last fifth is the test, everything before it is training and history, so that nothing of the
future is seen. A film is liked from 4 stars on. Measured is the area under the ROC curve over all test ratings.

python examples/recommend.py --model .cache/minilm --data ml-latest-small
(https://grouplens.org/datasets/movielens/latest/: ratings.csv and movies.csv, not for commercial use; F. Maxwell Harper and
Joseph A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015)
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastpt

LIKED_FROM, HISTORY = 4.0, 12  # stars; films of a history


class Ratings:
    """All ratings in the order of time: users, films, stars, and the films' titles with their genres."""

    def __init__(self, folder: Path):
        with (folder / "movies.csv").open(encoding="utf-8") as file:
            self.titles = {
                row["movieId"]: f"{row['title']} [{row['genres'].replace('|', ', ')}]" for row in csv.DictReader(file)
            }
        with (folder / "ratings.csv").open() as file:
            rows = sorted(csv.DictReader(file), key=lambda row: (int(row["timestamp"]), row["userId"], row["movieId"]))
        self.users, self.films = [row["userId"] for row in rows], [row["movieId"] for row in rows]
        self.stars = np.array([float(row["rating"]) for row in rows])
        self.split = len(rows) * 4 // 5

    def texts(self) -> list[dict[str, Any]]:
        """Of each rating the film (text), what the person rated last before it (text_pair) and whether they liked it."""
        seen: dict[str, list[str]] = defaultdict(list)
        found = []
        for user, film, stars in zip(self.users, self.films, self.stars, strict=True):
            before = "; ".join(reversed(seen[user][-HISTORY:])) or "nothing yet"
            label = "liked" if stars >= LIKED_FROM else "not"
            found.append({"text": self.titles[film], "text_pair": before, "label": label})
            seen[user].append(f"{'liked' if stars >= LIKED_FROM else 'not'} {self.titles[film].rsplit(' [', 1)[0]}")
        return found


def area_under_curve(scores: np.ndarray, liked: np.ndarray) -> float:
    """The chance that a liked rating is scored above one that is not, ties counting half."""
    order, ranks = np.argsort(scores, kind="stable"), np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    values, first, count = np.unique(scores[order], return_index=True, return_counts=True)
    tied = dict(zip(values.tolist(), (first + (count + 1) / 2).tolist(), strict=True))
    ranks = np.array([tied[value] for value in scores.tolist()])
    positives = int(liked.sum())
    return float((ranks[liked].sum() - positives * (positives + 1) / 2) / (positives * (len(liked) - positives)))


def popularity(ratings: Ratings) -> np.ndarray:
    """The share of training ratings of a film that are likes, drawn towards the mean of all films."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    mean = float((ratings.stars[: ratings.split] >= LIKED_FROM).mean())
    for film, stars in zip(ratings.films[: ratings.split], ratings.stars, strict=False):
        sums[film][0] += stars >= LIKED_FROM
        sums[film][1] += 1
    return np.array([(sums[film][0] + 5 * mean) / (sums[film][1] + 5) for film in ratings.films[ratings.split :]])


def factorisation(ratings: Ratings, rank: int, decay: float, until: int, seed: int) -> np.ndarray:
    """Biases and factors of users and films (Koren et al. 2009), trained on the ratings before `until`; scores of all ratings."""
    torch.manual_seed(seed)
    users, films = (torch.tensor(_numbers(names)) for names in (ratings.users, ratings.films))
    stars = torch.tensor(ratings.stars, dtype=torch.float32)
    of_user, of_film = (
        torch.nn.Embedding(int(users.max()) + 1, rank + 1),
        torch.nn.Embedding(int(films.max()) + 1, rank + 1),
    )
    for table in (of_user, of_film):
        torch.nn.init.normal_(table.weight, std=0.05)
    mean = stars[:until].mean()

    def predict(chosen: torch.Tensor) -> torch.Tensor:
        u, f = of_user(users[chosen]), of_film(films[chosen])
        return mean + u[:, 0] + f[:, 0] + (u[:, 1:] * f[:, 1:]).sum(1)

    optimizer = torch.optim.Adam([of_user.weight, of_film.weight], lr=5e-3)
    for _ in range(12):
        for chosen in torch.randperm(until).split(1024):
            u, f = of_user(users[chosen]), of_film(films[chosen])
            loss = ((predict(chosen) - stars[chosen]) ** 2).mean() + decay * (
                u.square().sum(1) + f.square().sum(1)
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return predict(torch.arange(len(stars))).numpy()


def _numbers(names: list[str]) -> list[int]:
    place = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [place[name] for name in names]


def best_factorisation(ratings: Ratings, seed: int) -> np.ndarray:
    """Rank and decay chosen on the last tenth of the training ratings."""
    until = ratings.split * 9 // 10
    liked = ratings.stars[until : ratings.split] >= LIKED_FROM

    def judged(setting: tuple[int, float]) -> float:
        return area_under_curve(factorisation(ratings, *setting, until, seed)[until : ratings.split], liked)

    rank, decay = max([(rank, decay) for rank in (4, 16) for decay in (0.01, 0.03, 0.1)], key=judged)
    return factorisation(ratings, rank, decay, ratings.split, seed)[ratings.split :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/minilm")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20000, help="latest training ratings that the encoder reads")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/recommend")
    parser.add_argument("--json", type=Path, help="append the results to this file")
    options = parser.parse_args()
    ratings = Ratings(options.data)
    texts, liked = ratings.texts(), ratings.stars[ratings.split :] >= LIKED_FROM
    train, test = texts[: ratings.split][-options.rows :], texts[ratings.split :]
    random.Random(options.seed).shuffle(train)
    started = time.monotonic()
    run = fastpt.train(
        options.model, {"path": train, "too_long": "truncate"}, "classify", "full", max_length=256, batch_rows=64,
        epochs=options.epochs, seed=options.seed, output=options.output, quiet=True, **{"optim.lr": options.lr},
    )  # fmt: skip
    minutes = (time.monotonic() - started) / 60
    judged = run.predict([(row["text"], row["text_pair"]) for row in test])
    scores = {
        "popularity": popularity(ratings),
        "matrix factorisation": best_factorisation(ratings, options.seed),
        "encoder": np.array([one.probabilities["liked"] for one in judged]),
    }
    ranked = [np.argsort(np.argsort(scores[name])) for name in ("matrix factorisation", "encoder")]
    scores["encoder and factorisation"] = (ranked[0] + ranked[1]).astype(float)
    told = {name: area_under_curve(values, liked) for name, values in scores.items()}
    print(
        f"{len(train)} training rows in {minutes:.1f} minutes; {len(test)} test ratings, {liked.mean():.2f} of them liked"
    )
    for name, value in told.items():
        print(f"{name}: area under the curve {value:.3f}")
    if options.json:
        about = {key: str(value) for key, value in vars(options).items()}
        with options.json.open("a") as file:
            file.write(json.dumps({"auc": told, "minutes": minutes, "test": len(test), "settings": about}) + "\n")


if __name__ == "__main__":
    main()
