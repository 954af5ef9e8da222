// Runs against the server at SHOPLM_ADDRESS, which must have demo customers: any ShopLM server will do.
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';

import { CancelledError, Client, DeadlineExceededError, InvalidArgumentError, UnavailableError } from '../src/index.js';

const address = process.env.SHOPLM_ADDRESS;
assert.ok(address, 'set SHOPLM_ADDRESS to the host:port of a running server');

let client;
let model;

before(async () => {
  client = new Client(address);
  await client.waitUntilReady();
  model = await client.getModel();
});

after(() => client.close());

test('getModel tells what is served', () => {
  assert.ok(model.model.baseModel);
  assert.ok(model.itemCount > 0);
  assert.ok(model.demoCustomerIds.length > 0);
  assert.ok(model.limits.maxCount > 0);
  assert.ok(model.targets.every(({ kind }) => kind !== 'unspecified'));
});

test('recommend explains scores exactly', async () => {
  const answer = await client.recommend({ customer: model.demoCustomerIds[0], count: 3, explain: true });
  assert.equal(answer.items.length, 3);
  assert.deepEqual(answer.model, model.model);
  assert.ok(answer.usage.promptTokens > 0);
  for (const { itemId, score, reasons } of answer.items) {
    assert.ok(itemId);
    const sum = reasons.reduce((total, reason) => total + reason.contribution, 0);
    assert.ok(Math.abs(sum - score) < 1e-3, `reasons of ${itemId} add up to ${sum}, its score is ${score}`);
  }
  const scores = answer.items.map(({ score }) => score);
  assert.deepEqual(scores, scores.toSorted((a, b) => b - a));
});

test('rank orders the given items and warns of unknown ones', async () => {
  const customer = model.demoCustomerIds[0];
  const itemIds = (await client.recommend({ customer, count: 3 })).items.map(({ itemId }) => itemId);
  const answer = await client.rank({ customer, itemIds: [...itemIds.toReversed(), 'no such item'] });
  assert.deepEqual(answer.items.map(({ itemId }) => itemId), itemIds);
  assert.ok(answer.warnings.some(({ code, count }) => code === 'UNKNOWN_ITEM' && count === 1));
});

test('a history of one customer is sent as events', async () => {
  const { items } = await client.recommend({ customer: model.demoCustomerIds[0], count: 2 });
  const events = items.map(({ itemId }, index) => ({ itemId, time: new Date(Date.UTC(2026, 0, 10 + index)), price: 1.5 }));
  const answer = await client.recommend({ customer: { id: 'from-node', events, asOf: new Date(Date.UTC(2026, 1, 1)) } });
  assert.ok(answer.items.length > 0);
});

test('predict answers every target with a probability or an amount', async () => {
  const answer = await client.predict({ customer: model.demoCustomerIds[0] });
  assert.equal(answer.predictions.length, model.targets.length);
  for (const { probability, amount } of answer.predictions) {
    assert.notEqual(probability === undefined, amount === undefined);
    if (probability !== undefined) assert.ok(probability >= 0 && probability <= 1);
  }
});

test('chat streams text and ends with a summary', async () => {
  const chat = client.chat([{ role: 'user', content: 'How do returns work?' }], { maxTokens: 5 });
  assert.throws(() => chat.summary, /has not ended/);
  const deltas = [];
  for await (const delta of chat) deltas.push(delta);
  assert.ok(deltas.length > 0);
  assert.ok(chat.summary.usage.completionTokens <= 5);
  assert.ok(['stop', 'length'].includes(chat.summary.finishReason));
});

test('breaking out of a chat leaves the client usable', async () => {
  for await (const delta of client.chat('Tell me everything about coffee.', { maxTokens: 40 })) {
    assert.ok(delta);
    break;
  }
  assert.ok(await client.getModel());
});

test('a wrong field is named', async () => {
  const count = model.limits.maxCount + 1;
  await assert.rejects(client.recommend({ customer: model.demoCustomerIds[0], count, requestId: 'from-node' }), (error) => {
    assert.ok(error instanceof InvalidArgumentError);
    assert.equal(error.violations[0].field, 'count');
    assert.match(error.violations[0].description, new RegExp(String(count)));
    assert.equal(error.requestId, 'from-node');
    assert.equal(error.reason, 'INVALID_REQUEST');
    return true;
  });
  const robot = /** @type {any} */ ([{ role: 'robot', content: 'hi' }]);
  await assert.rejects(client.chat(robot).text(), InvalidArgumentError);
});

test('arguments that cannot be sent are refused at once', async () => {
  const customer = model.demoCustomerIds[0];
  await assert.rejects(client.recommend({ customer, count: 0 }), RangeError);
  await assert.rejects(client.recommend({ customer, timeoutMs: -1 }), RangeError);
  await assert.rejects(client.recommend({ customer: { events: [{ itemId: 'x', time: new Date('soon') }] } }), TypeError);
  await assert.rejects(client.predict({ customer, targets: [{ kind: /** @type {any} */ ('luck') }] }), RangeError);
});

test('keys that a request does not have are refused, not left out', async () => {
  const customer = model.demoCustomerIds[0];
  const misspelt = /** @type {any[]} */ ([
    { customer, cuont: 3 },
    { customer, filter: { categories: ['x'] } },
    { customer: { id: customer, event: [] } },
    { customer: { events: [{ item_id: 'x', time: new Date() }] } },
  ]);
  for (const request of misspelt) await assert.rejects(client.recommend(request), { name: 'TypeError', message: / has no '/ });
  await assert.rejects(client.rank(/** @type {any} */ ({ customer, itemIds: [], filter: {} })), /has no 'filter'/);
  const days = /** @type {any} */ ([{ kind: 'purchase', days: 7 }]);
  await assert.rejects(client.predict({ customer, targets: days }), /targets\[0\] has no 'days'/);
  assert.throws(() => client.chat(/** @type {any} */ ([{ role: 'user', text: 'hi' }])), /messages\[0\] has no 'text'/);
  assert.throws(() => client.chat('hi', /** @type {any} */ ({ max_tokens: 3 })), /has no 'max_tokens'/);
  assert.throws(() => new Client(address, /** @type {any} */ ({ timeout: 3 })), /has no 'timeout'/);
  assert.throws(() => new Client(address, { timeoutMs: /** @type {any} */ ({ chats: 3 }) }), /has no 'chats'/);
});

test('what must be an array is not one string', async () => {
  const customer = model.demoCustomerIds[0];
  const filter = /** @type {any} */ ({ includeCategories: 'x' });
  await assert.rejects(client.recommend({ customer, filter }), /filter.includeCategories must be an array, not x/);
  assert.throws(() => client.chat(/** @type {any} */ ({ role: 'user', content: 'hi' })), /messages must be an array/);
  await client.chat('hi', { stop: 'one string is one stop string', maxTokens: 2 }).text();
});

test('a request id that servers do not take is refused', async () => {
  await assert.rejects(client.getModel({ requestId: 'a b' }), /requestId must be 1 to 128 letters.* not a b/);
});

test('no proxy is asked for the own machine', async () => {
  process.env.http_proxy = 'http://127.0.0.1:1';
  const local = new Client(address, { retries: false });
  assert.ok(await local.getModel());
  local.close();
  delete process.env.http_proxy;
});

test('a deadline that cannot be met is told', async () => {
  await assert.rejects(client.chat('Count to a thousand.', { timeoutMs: 0.001 }).text(), DeadlineExceededError);
});

test('a signal cancels', async () => {
  const controller = new AbortController();
  const chat = client.chat('Tell me everything about coffee.', { signal: controller.signal });
  const reading = chat.text();
  controller.abort();
  await assert.rejects(reading, CancelledError);
});

test('no server is unavailable', async () => {
  const nobody = new Client('127.0.0.1:1', { retries: false });
  await assert.rejects(nobody.getModel(), UnavailableError);
  await assert.rejects(nobody.waitUntilReady(100), UnavailableError);
  nobody.close();
});
