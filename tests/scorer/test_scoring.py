"""Predictions over HTTP: the right number, by the right version, with a receipt."""

from tests.scorer.making import Registry, StartScorer, Trained


async def test_smoke(start_scorer: StartScorer, registry: Registry, models: dict[str, Trained]) -> None:
    trained = models["binomial"]
    await registry.promote("delay", 1, await registry.store(trained, "delay"))
    scorer = await start_scorer()
    print(scorer.log)
    for row, scores in zip(trained.rows[:50], trained.scores, strict=False):
        answer = await scorer.score("delay", row)
        assert abs(answer["score"] - scores[1]) <= 1e-6
    print(answer)
    assert 0
