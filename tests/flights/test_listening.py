import asyncio
from datetime import UTC, datetime
from uuid import UUID, uuid4

from mojomesh_chassis.publishing import Publisher
from mojomesh_contracts.events import DriftDetected, EventReceived, FeaturesWritten, Prediction, PredictionsMade
from mojomesh_flights.listening import Listener, Offsets

TIME = datetime(2013, 5, 1, 10, tzinfo=UTC)


def make_block(*ids: UUID, model: str = "flight-delay") -> PredictionsMade:
    predictions = [
        Prediction(
            prediction_id=one, entity_id="UA1", event_time=TIME, made_at=TIME, inputs=[1.0, None], scores=[0.75, 0.25], request_id=one
        )
        for one in ids
    ]
    return PredictionsMade(event_id=uuid4(), model=model, version=2, bundle_digest="ab", replica="0", predictions=predictions)


def make_alert() -> DriftDetected:
    return DriftDetected(
        event_id=uuid4(),
        model="flight-delay",
        version=1,
        feature="weather.temp",
        measure="psi",
        value=2.0,
        threshold=1.0,
        windows=3,
        window_from=TIME,
        window_to=TIME,
    )


async def test_what_is_said_twice_is_taken_once(kafka: str) -> None:
    block, alert, other, last = make_block(uuid4(), uuid4()), make_alert(), make_block(uuid4(), model="other"), make_block(uuid4())
    publisher = Publisher(kafka)
    await publisher.publish([block, alert, other, block, alert, last])
    await publisher.close()
    listener = Listener(kafka, "flight-delay")

    listening = asyncio.create_task(listener.run())
    while len(listener.predictions) < 3 or not listener.alerts:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    listening.cancel()
    await asyncio.wait([listening])

    assert sorted(listener.predictions.ids) == sorted(str(one.prediction_id) for made in (block, last) for one in made.predictions)
    assert listener.alerts == [alert]
    assert list(listener.predictions.scores) == [0.25] * 3
    assert listener.predictions.n_requested == 3


async def test_lag_counts_what_nobody_has_handled(kafka: str) -> None:
    publisher = Publisher(kafka)
    events = [EventReceived(event_id=uuid4(), feature_set="flights", entity_id=f"UA{n}", event_time=TIME, values={}) for n in range(20)]
    await publisher.publish(events)
    await publisher.close()

    async with Offsets(kafka) as offsets:
        assert await offsets.lag("ingest", EventReceived) == 20
        assert await offsets.lag("features", FeaturesWritten) == 0
