/** ShopLM's client for Node. See index.d.ts for the types, errors.js for what a call can reject with. */
import { randomUUID } from 'node:crypto';
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

import grpc from '@grpc/grpc-js';
import loader from '@grpc/proto-loader';

import { errorFromRpc, UnavailableError } from './errors.js';
import * as wire from './wire.js';

export * from './errors.js';

const DEFAULT_TIMEOUTS_MS = { recommendation: 10_000, chat: 120_000, prediction: 10_000, model: 5_000 };
const PRIORITY_KEY = 'x-priority';
const MOST_PRIORITY = 100;
const TENANT_KEY = 'x-tenant-id'; // the server's default for its tenant_metadata_key
const NAME = /^[A-Za-z0-9._:/+=@-]{1,128}$/; // what servers take as a tenant or a request id
const LOOPBACK = /^(dns:(\/\/\/)?|ipv[46]:)?(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$/;
const SERVICES = ['recommendation', 'chat', 'prediction', 'model'];
const CERTIFICATES = ['tls', 'rootCertificates', 'certificateChain', 'privateKey'];
const OPTIONS = ['token', 'tenant', 'timeoutMs', ...CERTIFICATES, 'retries', 'roundRobin'];

// A published package carries the contract inside; in the repository it lies beside the clients.
const inside = fileURLToPath(new URL('../protos', import.meta.url));
const PROTO_ROOT = existsSync(inside) ? inside : fileURLToPath(new URL('../../../protos', import.meta.url));
const { v1 } = /** @type {any} */ (
  grpc.loadPackageDefinition(
    loader.loadSync(
      SERVICES.map((name) => `shoplm/v1/${name}.proto`),
      { includeDirs: [PROTO_ROOT], longs: Number, enums: String, defaults: true, oneofs: true },
    ),
  )
).shoplm;

/**
 * Retried within the deadline, before the first message and with the server's pushback: UNAVAILABLE, RESOURCE_EXHAUSTED,
 * and CANCELLED, with which gRPC breaks off calls that are under way to a port that closes.
 */
function serviceConfig(retries, roundRobin) {
  return JSON.stringify({
    ...(roundRobin && { loadBalancingConfig: [{ round_robin: {} }] }),
    ...(retries && {
      methodConfig: [
        {
          name: ['Recommendation', 'Chat', 'Prediction', 'Model'].map((name) => ({ service: `shoplm.v1.${name}Service` })),
          retryPolicy: {
            maxAttempts: 4,
            initialBackoff: '0.1s',
            maxBackoff: '2s',
            backoffMultiplier: 2,
            retryableStatusCodes: ['UNAVAILABLE', 'RESOURCE_EXHAUSTED', 'CANCELLED'],
          },
        },
      ],
      retryThrottling: { maxTokens: 20, tokenRatio: 0.2 },
    }),
  });
}

function checkTimeout(name, value) {
  if (!(Number.isFinite(value) && value > 0)) {
    throw new RangeError(`${name} must be a number of milliseconds above 0, not ${String(value)}`);
  }
  return value;
}

function checkPriority(value) {
  if (!(Number.isInteger(value) && Math.abs(value) <= MOST_PRIORITY)) {
    throw new RangeError(`priority must be an integer from -${MOST_PRIORITY} to ${MOST_PRIORITY}, not ${String(value)}`);
  }
  return value;
}

/** @param {import('./index.js').ClientOptions} options */
function credentialsOf({ tls = false, rootCertificates, certificateChain, privateKey }) {
  if ((certificateChain === undefined) !== (privateKey === undefined)) {
    throw new TypeError('certificateChain and privateKey come together: give both or none');
  }
  if (!(tls || rootCertificates || privateKey)) return grpc.credentials.createInsecure();
  return grpc.credentials.createSsl(rootCertificates ?? null, privateKey ?? null, certificateChain ?? null);
}

/** A chat answer while it arrives: iterate over its text, then read `summary`. Breaking out cancels the call. */
export class ChatStream {
  #call;
  #summary;

  constructor(call, requestId) {
    this.#call = call;
    this.requestId = requestId;
    // The iterator below reports errors; without a listener, one after the iteration would end the process.
    call.on('error', () => {});
  }

  async *[Symbol.asyncIterator]() {
    try {
      for await (const event of this.#call) {
        if (event.event === 'summary') this.#summary = wire.summaryFrom(event.summary);
        else if (event.delta) yield event.delta;
      }
    } catch (error) {
      throw errorFromRpc(error, this.requestId);
    } finally {
      this.#call.cancel();
    }
  }

  /** The rest of the answer as one string. */
  async text() {
    let text = '';
    for await (const delta of this) text += delta;
    return text;
  }

  /** Finish reason, usage and citations; throws before the iteration has ended. */
  get summary() {
    if (this.#summary === undefined) {
      throw new Error('the answer has not ended yet: iterate to its end, or await text(), before summary');
    }
    return this.#summary;
  }

  /** Stop the answer; no effect when it has ended. */
  cancel() {
    this.#call.cancel();
  }
}

/** Calls to a ShopLM server; keep one for the whole process and close it at its end. */
export class Client {
  #timeouts;
  #token;
  #tenant;
  #stubs;

  /**
   * @param {string} [address]
   * @param {import('./index.js').ClientOptions} [options]
   */
  constructor(address = '127.0.0.1:50051', options = {}) {
    const { token, tenant, timeoutMs, retries = true, roundRobin = false } = wire.only(options, OPTIONS, 'the options');
    if (typeof timeoutMs === 'object') wire.only(timeoutMs, SERVICES, 'timeoutMs');
    if (tenant !== undefined && !NAME.test(tenant)) {
      throw new RangeError(`tenant must be 1 to 128 letters, digits or ._:/+=@-, not ${String(tenant)}`);
    }
    this.#token = token;
    this.#tenant = tenant;
    this.#timeouts = { ...DEFAULT_TIMEOUTS_MS };
    for (const name of SERVICES) {
      const given = typeof timeoutMs === 'object' ? timeoutMs[name] : timeoutMs;
      if (given !== undefined) this.#timeouts[name] = checkTimeout('timeoutMs', given);
    }
    const credentials = credentialsOf(options);
    const channelOptions = {
      'grpc.service_config': serviceConfig(retries, roundRobin),
      'grpc.enable_retries': retries ? 1 : 0,
      'grpc.keepalive_time_ms': 60_000,
      'grpc.keepalive_timeout_ms': 10_000,
      // A proxy would look for the server on its own machine.
      ...(LOOPBACK.test(address) && { 'grpc.enable_http_proxy': 0 }),
    };
    const channel = new grpc.Channel(address, credentials, channelOptions);
    const stub = (service) => new service(address, credentials, { channelOverride: channel });
    this.#stubs = {
      recommendation: stub(v1.RecommendationService),
      chat: stub(v1.ChatService),
      prediction: stub(v1.PredictionService),
      model: stub(v1.ModelService),
    };
  }

  /** The best items for a customer, best first. */
  async recommend({ timeoutMs, requestId, signal, priority, ...request }) {
    const terms = { timeoutMs, requestId, signal, priority };
    return wire.rankingFrom(await this.#unary('recommendation', 'recommend', wire.recommendRequest(request), terms));
  }

  /** The given items with their scores for a customer, best first. */
  async rank({ timeoutMs, requestId, signal, priority, ...request }) {
    const terms = { timeoutMs, requestId, signal, priority };
    return wire.rankingFrom(await this.#unary('recommendation', 'rank', wire.rankRequest(request), terms));
  }

  /** One prediction for each target; without targets, all that the bundle has. */
  async predict({ timeoutMs, requestId, signal, priority, ...request }) {
    const terms = { timeoutMs, requestId, signal, priority };
    return wire.predictionsFrom(await this.#unary('prediction', 'predict', wire.predictRequest(request), terms));
  }

  /** What the server serves. */
  async getModel(terms = {}) {
    return wire.modelFrom(await this.#unary('model', 'getModel', {}, terms));
  }

  /** The assistant's next turn as a stream of text. */
  chat(messages, { timeoutMs, requestId = randomUUID(), signal, priority, ...request } = {}) {
    const options = { deadline: this.#deadline('chat', timeoutMs) };
    const message = wire.chatRequest(messages, request);
    signal?.throwIfAborted();
    const call = this.#stubs.chat.chat(message, this.#metadata(requestId, priority), options);
    const abort = () => call.cancel();
    signal?.addEventListener('abort', abort, { once: true });
    call.on('status', () => signal?.removeEventListener('abort', abort));
    return new ChatStream(call, requestId);
  }

  /** Resolves when the server accepts connections; rejects with UnavailableError after `timeoutMs`. */
  async waitUntilReady(timeoutMs = 30_000) {
    const deadline = Date.now() + checkTimeout('timeoutMs', timeoutMs);
    await new Promise((resolve, reject) => {
      const nobody = () => new UnavailableError(`no server accepted a connection within ${timeoutMs} ms`, { code: grpc.status.UNAVAILABLE });
      this.#stubs.model.waitForReady(deadline, (error) => (error ? reject(nobody()) : resolve(undefined)));
    });
  }

  /** Close the connection. */
  close() {
    this.#stubs.model.getChannel().close();
  }

  #deadline(service, timeoutMs) {
    return Date.now() + (timeoutMs === undefined ? this.#timeouts[service] : checkTimeout('timeoutMs', timeoutMs));
  }

  #metadata(requestId, priority) {
    if (!NAME.test(requestId)) {
      throw new RangeError(`requestId must be 1 to 128 letters, digits or ._:/+=@-, not ${String(requestId)}`);
    }
    const metadata = new grpc.Metadata();
    metadata.set('x-request-id', requestId);
    if (this.#tenant !== undefined) metadata.set(TENANT_KEY, this.#tenant);
    if (priority !== undefined) metadata.set(PRIORITY_KEY, String(checkPriority(priority)));
    if (this.#token !== undefined) metadata.set('authorization', `Bearer ${this.#token}`);
    return metadata;
  }

  async #unary(service, method, request, { timeoutMs, requestId = randomUUID(), signal, priority }) {
    const options = { deadline: this.#deadline(service, timeoutMs) };
    const metadata = this.#metadata(requestId, priority);
    signal?.throwIfAborted();
    let abort;
    try {
      return await new Promise((resolve, reject) => {
        const call = this.#stubs[service][method](request, metadata, options, (error, response) =>
          error ? reject(errorFromRpc(error, requestId)) : resolve(response),
        );
        abort = () => call.cancel();
        signal?.addEventListener('abort', abort, { once: true });
      });
    } finally {
      signal?.removeEventListener('abort', abort);
    }
  }
}
