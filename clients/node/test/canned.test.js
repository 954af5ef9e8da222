// What only a server that fails on purpose can show; SHOPLM_CANNED_ADDRESS is such a server (tests/clients/canned_server.py).
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';

import {
  Client,
  DeadlineExceededError,
  OverloadedError,
  PermissionDeniedError,
  ServerError,
  UnauthenticatedError,
  UnavailableError,
} from '../src/index.js';

const address = process.env.SHOPLM_CANNED_ADDRESS;
const options = { skip: address ? false : 'SHOPLM_CANNED_ADDRESS is not set' };
let client;

before(() => {
  if (address) client = new Client(address);
});
after(() => client?.close());

test('overload says when to try again', options, async () => {
  await assert.rejects(client.recommend({ customer: 'refused' }), (error) => {
    assert.ok(error instanceof OverloadedError);
    assert.ok(Math.abs(error.retrySeconds - 0.25) < 1e-6);
    assert.equal(error.reason, 'QUEUE_FULL');
    return true;
  });
});

test('unavailable is retried up to three times', options, async () => {
  assert.ok((await client.recommend({ customer: 'flaky-3' })).items.length);
  await assert.rejects(client.recommend({ customer: 'flaky-4' }), UnavailableError);
  assert.ok(await client.chat('hi', { customer: 'flaky-1' }).text());
});

test('a call that a closing port breaks off is tried again', options, async () => {
  assert.ok((await client.recommend({ customer: 'broken-off' })).items.length);
});

test('a fault of the server is not retried', options, async () => {
  await assert.rejects(client.predict({ customer: 'broken' }), (error) => {
    assert.ok(error instanceof ServerError);
    assert.match(error.message, /a step failed/);
    return true;
  });
});

test('the deadline ends a call that gets no answer', options, async () => {
  await assert.rejects(client.recommend({ customer: 'slow', timeoutMs: 200 }), DeadlineExceededError);
});

test('interval, absent price and inapplicable targets', options, async () => {
  const { predictions } = await client.predict({ customer: '7' });
  const spend = predictions.find(({ target }) => target.kind === 'spend');
  assert.deepEqual(spend.interval, [10, 90]);
  assert.equal(spend.probability, undefined);
  assert.equal(spend.populationMean, 30);
  assert.equal(predictions.find(({ target }) => target.kind === 'churn').applicable, false);
  const { items } = await client.recommend({ customer: '7' });
  assert.equal(items[1].price, undefined);
});

test('influences come with items and predictions', options, async () => {
  const { items } = await client.recommend({ customer: '7', explain: true });
  const [milk, habit] = items[0].influences;
  assert.deepEqual([milk.kind, milk.itemId, milk.visits, milk.effect, milk.modelEffect], ['item', 'milk', 3, 0.75, 0.25]);
  assert.equal(milk.time.toISOString(), '2023-11-14T22:13:20.500Z');
  assert.deepEqual([habit.kind, habit.itemId, habit.time, habit.modelEffect], ['habit', undefined, undefined, undefined]);
  const answer = await client.predict({ customer: '7', explain: true, allowDegraded: true });
  assert.equal(answer.predictions[0].influences.length, 2);
  assert.deepEqual(answer.degradations, ['no_explanation']);
});

test('what was taken from an answer has a name', options, async () => {
  const answer = await client.recommend({ customer: '7', allowDegraded: true });
  assert.deepEqual(answer.degradations, ['narrower_beams']);
  const ranked = await client.rank({ customer: '7', itemIds: ['milk'], explain: true, allowDegraded: true });
  assert.deepEqual(ranked.degradations, ['no_explanation']);
  assert.deepEqual((await client.rank({ customer: '7', itemIds: ['milk'] })).degradations, []);
  const chat = client.chat('hi', { customer: '7', allowDegraded: true });
  await chat.text();
  assert.deepEqual(chat.summary.degradations, ['fewer_tokens']);
});

test('the tenant is sent, and one that cannot be is refused', options, async () => {
  const blue = new Client(address, { tenant: 'blue' });
  await blue.recommend({ customer: '7', requestId: 'of-blue' });
  blue.close();
  assert.throws(() => new Client(address, { tenant: 'not blue' }), /tenant must be .* not blue/);
});

test('the priority of a call is sent, and one that cannot be is refused', options, async () => {
  const itemIds = ['milk'];
  await client.recommend({ customer: '7', priority: -100, requestId: 'node-recommend' });
  await client.rank({ customer: '7', itemIds, priority: 0, requestId: 'node-rank' });
  await client.predict({ customer: '7', priority: 7, requestId: 'node-predict' });
  await client.chat('hi', { priority: 100, requestId: 'node-chat' }).text();
  await assert.rejects(client.recommend({ customer: '7', priority: 101 }), /priority must be .* not 101/);
  assert.throws(() => client.chat('hi', { priority: 1.5 }), RangeError);
});

test('prices and the stock condition reach the wire', options, async () => {
  const events = [{ itemId: 'milk', time: new Date(0), price: 16_777_217 }];
  const filter = { maxPrice: 3.49, inStockOnly: true };
  await client.recommend({ customer: { id: '7', events }, filter, requestId: 'node-filter' });
});

test('a right that the token does not have is told from a wrong token', options, async () => {
  await assert.rejects(client.recommend({ customer: 'denied' }), (error) => {
    assert.ok(error instanceof PermissionDeniedError);
    assert.ok(!(error instanceof UnauthenticatedError));
    return true;
  });
});

test('half of a client certificate is refused', options, () => {
  assert.throws(() => new Client(address, { privateKey: Buffer.from('key') }), /certificateChain and privateKey/);
});
