/** Between the client's plain objects and protobuf messages as @grpc/proto-loader shapes them. */

/** @param {Date} moment @param {string} name */
function timestamp(moment, name) {
  const milliseconds = moment instanceof Date ? moment.getTime() : NaN;
  if (Number.isNaN(milliseconds)) throw new TypeError(`${name} must be a valid Date, not ${String(moment)}`);
  const seconds = Math.floor(milliseconds / 1000);
  return { seconds, nanos: Math.round((milliseconds - seconds * 1000) * 1e6) };
}

/** `purchase` -> `TARGET_KIND_PURCHASE`, refusing what the contract does not have. */
function enumName(prefix, value, allowed, name) {
  if (!allowed.includes(value)) throw new RangeError(`${name} must be one of ${allowed.join(', ')}, not ${String(value)}`);
  return `${prefix}_${value.toUpperCase()}`;
}

/** `TARGET_KIND_PURCHASE` -> `purchase`; a number from a newer server -> `unspecified`. */
const enumValue = (prefix, value) =>
  typeof value === 'string' ? value.slice(prefix.length + 1).toLowerCase() : 'unspecified';

/** 0 means "unset" on the wire, so it must not be sent as if it were a default. */
function positive(value, name) {
  if (value === undefined) return undefined;
  if (!(Number.isInteger(value) && value > 0)) {
    throw new RangeError(`${name} must be an integer above 0, not ${String(value)}; leave it out for the default`);
  }
  return value;
}

/** Refuses keys that a request does not have: one misspelt must not be left out in silence. */
export function only(value, keys, name) {
  if (value === null || typeof value !== 'object') throw new TypeError(`${name} must be an object, not ${String(value)}`);
  const unknown = Object.keys(value).find((key) => !keys.includes(key));
  if (unknown !== undefined) throw new TypeError(`${name} has no '${unknown}'; it has ${keys.join(', ')}`);
  return value;
}

function list(value, name) {
  if (!Array.isArray(value)) throw new TypeError(`${name} must be an array, not ${String(value)}`);
  return value;
}

const CUSTOMER = ['id', 'events', 'attributes', 'asOf'];
const EVENT = ['itemId', 'time', 'type', 'quantity', 'price', 'basketId'];
const FILTER_LISTS = ['includeCategories', 'excludeCategories', 'excludeItemIds'];
const FILTER = [...FILTER_LISTS, 'excludePurchased', 'minPrice', 'maxPrice', 'inStockOnly'];
const RECOMMEND = ['customer', 'count', 'filter', 'beamWidth', 'explain', 'allowDegraded'];
const RANK = ['customer', 'itemIds', 'explain', 'allowDegraded'];
const PREDICT = ['customer', 'targets', 'explain', 'allowDegraded'];
const TARGET = ['kind', 'horizonDays', 'campaignType'];
const MESSAGE = ['role', 'content'];
const SAMPLING = ['maxTokens', 'temperature', 'topK', 'topP', 'seed', 'stop'];
const CHAT = ['customer', ...SAMPLING, 'grounding', 'allowDegraded'];
export const EVENT_TYPES = ['view', 'cart', 'purchase', 'return'];
export const TARGET_KINDS = ['purchase', 'purchase_count', 'spend', 'churn', 'coupon_redemption'];

/** @param {any} customer */
export function customerMessage(customer) {
  if (typeof customer === 'string') return { customerId: customer };
  if (customer === null || typeof customer !== 'object') {
    throw new TypeError(`customer must be an id or an object, not ${String(customer)}`);
  }
  only(customer, CUSTOMER, 'customer');
  return {
    customerId: customer.id,
    attributes: customer.attributes,
    asOf: customer.asOf === undefined ? undefined : timestamp(customer.asOf, 'customer.asOf'),
    events: list(customer.events ?? [], 'customer.events').map((event, index) =>
      eventMessage(event, `customer.events[${index}]`),
    ),
  };
}

function eventMessage(event, name) {
  only(event, EVENT, name);
  return {
    itemId: event.itemId,
    type: enumName('EVENT_TYPE', event.type ?? 'purchase', EVENT_TYPES, `${name}.type`),
    time: timestamp(event.time, `${name}.time`),
    quantity: event.quantity ?? 1,
    price: event.price,
    basketId: event.basketId,
  };
}

function filterMessage(filter) {
  only(filter, FILTER, 'filter');
  for (const name of FILTER_LISTS) if (filter[name] !== undefined) list(filter[name], `filter.${name}`);
  return filter;
}

export function recommendRequest(request) {
  const { customer, count, filter, beamWidth, explain, allowDegraded } = only(request, RECOMMEND, 'the request');
  return {
    customer: customerMessage(customer),
    count: positive(count, 'count'),
    beamWidth: positive(beamWidth, 'beamWidth'),
    filter: filter === undefined ? undefined : filterMessage(filter),
    explain,
    allowDegraded,
  };
}

export function rankRequest(request) {
  const { customer, itemIds, explain, allowDegraded } = only(request, RANK, 'the request');
  return { customer: customerMessage(customer), itemIds: list(itemIds, 'itemIds'), explain, allowDegraded };
}

export function predictRequest(request) {
  const { customer, targets = [], explain, allowDegraded } = only(request, PREDICT, 'the request');
  return {
    customer: customerMessage(customer),
    explain,
    allowDegraded,
    targets: list(targets, 'targets').map((target, index) => targetMessage(target, `targets[${index}]`)),
  };
}

function targetMessage(target, name) {
  only(target, TARGET, name);
  return {
    kind: enumName('TARGET_KIND', target.kind, TARGET_KINDS, `${name}.kind`),
    horizonDays: positive(target.horizonDays, `${name}.horizonDays`),
    campaignType: target.campaignType,
  };
}

export function chatRequest(messages, request) {
  only(request, CHAT, 'the options');
  const { customer, maxTokens, temperature, topK, topP, seed, stop = [], grounding, allowDegraded } = request;
  const turns = typeof messages === 'string' ? [{ role: 'user', content: messages }] : list(messages, 'messages');
  return {
    customer: customer === undefined ? undefined : customerMessage(customer),
    messages: turns.map((message, index) => only(message, MESSAGE, `messages[${index}]`)),
    maxTokens: positive(maxTokens, 'maxTokens'),
    temperature,
    topK: positive(topK, 'topK'),
    topP,
    seed,
    stop: typeof stop === 'string' ? [stop] : list(stop, 'stop'),
    grounding: grounding === undefined ? undefined : grounding ? 'GROUNDING_ON' : 'GROUNDING_OFF',
    allowDegraded,
  };
}

const influence = ({ kind, itemId, title, time, visits, effect, modelEffect, text }) => ({
  kind: enumValue('KIND', kind),
  itemId: itemId || undefined,
  title,
  time: time ? new Date(Number(time.seconds) * 1000 + Math.round(time.nanos / 1e6)) : undefined,
  visits,
  effect,
  modelEffect,
  text,
});

const item = (message) => ({
  itemId: message.itemId,
  title: message.title,
  category: message.category,
  price: message.price,
  score: message.score,
  reasons: message.reasons.map((reason) => ({
    kind: enumValue('KIND', reason.kind),
    contribution: reason.contribution,
    text: reason.text,
  })),
  influences: message.influences.map(influence),
});

const target = (message) => ({
  kind: enumValue('TARGET_KIND', message.kind),
  horizonDays: message.horizonDays || undefined,
  campaignType: message.campaignType || undefined,
});

const degradations = (message) => message.degradations.map((value) => enumValue('DEGRADATION', value));

/** What every answer ends with. */
const common = ({ model, usage, warnings }) => ({ model, usage, warnings });

export const rankingFrom = (message) => ({
  items: message.items.map(item),
  degradations: degradations(message),
  ...common(message),
});

export const predictionsFrom = (message) => ({
  predictions: message.predictions.map((prediction) => ({
    target: target(prediction.target),
    probability: prediction.value === 'probability' ? prediction.probability : undefined,
    amount: prediction.value === 'amount' ? prediction.amount : undefined,
    interval:
      prediction.intervalLow === undefined || prediction.intervalHigh === undefined
        ? undefined
        : [prediction.intervalLow, prediction.intervalHigh],
    populationMean: prediction.populationMean,
    applicable: prediction.applicable,
    influences: prediction.influences.map(influence),
  })),
  degradations: degradations(message),
  ...common(message),
});

export const summaryFrom = (message) => ({
  finishReason: enumValue('FINISH_REASON', message.finishReason),
  citations: message.citations,
  degradations: degradations(message),
  ...common(message),
});

export const modelFrom = (message) => ({ ...message, targets: message.targets.map(target) });
