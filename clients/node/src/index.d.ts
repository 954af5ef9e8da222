/** What a customer did with an item. */
export type EventType = 'view' | 'cart' | 'purchase' | 'return';
/** What can be predicted. */
export type TargetKind = 'purchase' | 'purchase_count' | 'spend' | 'churn' | 'coupon_redemption';

export interface ShopEvent {
  itemId: string;
  time: Date;
  /** Default: purchase. */
  type?: EventType;
  /** Above 0. Default: 1. */
  quantity?: number;
  /** Of one unit, in the shop's currency. */
  price?: number;
  basketId?: string;
}

/** Whom a request is about: with no events, a demo customer's id stands for the history in the bundle. */
export interface Customer {
  id?: string;
  events?: ShopEvent[];
  attributes?: Record<string, string>;
  asOf?: Date;
}

export interface ItemFilter {
  includeCategories?: string[];
  excludeCategories?: string[];
  excludeItemIds?: string[];
  excludePurchased?: boolean;
  minPrice?: number;
  maxPrice?: number;
  inStockOnly?: boolean;
}

/** How one call is made. */
export interface CallOptions {
  /** Deadline; the server sees it. */
  timeoutMs?: number;
  /** What to look for in the server's log. */
  requestId?: string;
  /** Cancels the call. */
  signal?: AbortSignal;
}

/** How a call that the model answers is made. */
export interface WorkOptions extends CallOptions {
  /** A whole number from -100 to 100: larger is sooner, among the calls of one tenant. */
  priority?: number;
}

export interface RecommendRequest extends WorkOptions {
  customer: string | Customer;
  count?: number;
  filter?: ItemFilter;
  beamWidth?: number;
  explain?: boolean;
  allowDegraded?: boolean;
}

export interface RankRequest extends WorkOptions {
  customer: string | Customer;
  itemIds: string[];
  explain?: boolean;
  allowDegraded?: boolean;
}

export interface Target {
  kind: TargetKind;
  horizonDays?: number;
  /** Of coupon redemption, which has no horizon. */
  campaignType?: string;
}

export interface PredictRequest extends WorkOptions {
  customer: string | Customer;
  targets?: Target[];
  /** Say what moved each prediction. */
  explain?: boolean;
  allowDegraded?: boolean;
}

export interface Message {
  role: 'system' | 'user' | 'assistant';
  content: string;
}

export interface ChatOptions extends WorkOptions {
  /** Left out: a visitor. */
  customer?: string | Customer;
  maxTokens?: number;
  /** 0 or left out: greedy. */
  temperature?: number;
  topK?: number;
  topP?: number;
  seed?: number;
  stop?: string | string[];
  grounding?: boolean;
  /** Rather a shorter answer than a refusal when the server is busy. */
  allowDegraded?: boolean;
}

export interface ModelVersion {
  bundle: string;
  version: string;
  baseModel: string;
}

export interface Usage {
  promptTokens: number;
  cachedTokens: number;
  historyTokens: number;
  completionTokens: number;
  explanationTokens: number;
}

export interface Warning {
  code: string;
  message: string;
  count: number;
}

interface Answer {
  model: ModelVersion;
  usage: Usage;
  warnings: Warning[];
}

export interface Reason {
  kind: 'model' | 'repeat' | 'popularity' | 'goes_with' | 'unspecified';
  /** In nats; the reasons of an item add up to its score. */
  contribution: number;
  text: string;
}

/** A part of what is known of the customer, and the answer with it less the answer without it. */
export interface Influence {
  kind: 'item' | 'visit' | 'habit' | 'unspecified';
  itemId?: string;
  title: string;
  /** Of the visit, or of the newest event that it stands for. */
  time?: Date;
  visits: number;
  /** Of an item's score, the log-odds of a probability, or the logarithm of an amount. */
  effect: number;
  /** The model's share of the effect on an item's score. */
  modelEffect?: number;
  text: string;
}

export interface RecommendedItem {
  itemId: string;
  title: string;
  category: string;
  price?: number;
  /** In nats. */
  score: number;
  reasons: Reason[];
  /** On the score, the strongest first. */
  influences: Influence[];
}

/** What the server took from an answer, with the caller's leave, so that it came in time. */
export type Degradation = 'no_explanation' | 'narrower_beams' | 'fewer_tokens' | 'unspecified';

export interface Ranking extends Answer {
  items: RecommendedItem[];
  degradations: Degradation[];
}

export type Recommendations = Ranking;

export interface Prediction {
  target: Omit<Target, 'kind'> & { kind: TargetKind | 'unspecified' };
  probability?: number;
  amount?: number;
  /** The amount's 90 % prediction interval; none where the answer is the population mean, for want of a history. */
  interval?: [number, number];
  /** Over the customers of the training data: a share of them, or an amount. */
  populationMean: number;
  applicable: boolean;
  influences: Influence[];
}

export interface Predictions extends Answer {
  predictions: Prediction[];
  degradations: Degradation[];
}

export interface Citation {
  source: string;
  title: string;
  text: string;
}

export interface ChatSummary extends Answer {
  finishReason: 'stop' | 'length' | 'unspecified';
  citations: Citation[];
  degradations: Degradation[];
}

export interface ModelInfo {
  model: ModelVersion;
  limits: {
    maxContextTokens: number;
    maxHistoryTokens: number;
    maxEvents: number;
    maxCount: number;
    maxBeamWidth: number;
    maxCompletionTokens: number;
    maxMessageBytes: number;
    maxCandidates: number;
    maxTargets: number;
    maxMessages: number;
    maxTextBytes: number;
    maxStopStrings: number;
    maxFilterValues: number;
  };
  targets: Prediction['target'][];
  itemCount: number;
  categories: string[];
  attributes: string[];
  /** That training saw, of the attributes that have few. */
  attributeValues: { attribute: string; values: string[] }[];
  demoCustomerIds: string[];
  notice: string;
  serverVersion: string;
}

export interface ClientOptions {
  token?: string;
  /** As whom, where tenants share the server. */
  tenant?: string;
  /** Deadline of every call, or of each service's calls. */
  timeoutMs?: number | { recommendation?: number; chat?: number; prediction?: number; model?: number };
  tls?: boolean;
  /** PEM; implies tls. */
  rootCertificates?: Buffer;
  /** PEM, with `privateKey`, for servers that ask their clients for a certificate; implies tls. */
  certificateChain?: Buffer;
  privateKey?: Buffer;
  /** Default: true. */
  retries?: boolean;
  /** Spread calls over every address that the name resolves to; there are no health checks in grpc-js. */
  roundRobin?: boolean;
}

/** A chat answer while it arrives: iterate over its text, then read `summary`. Breaking out cancels the call. */
export class ChatStream implements AsyncIterable<string> {
  readonly requestId: string;
  [Symbol.asyncIterator](): AsyncGenerator<string, void, undefined>;
  /** The rest of the answer as one string. */
  text(): Promise<string>;
  /** Throws before the iteration has ended. */
  get summary(): ChatSummary;
  cancel(): void;
}

/** Calls to a ShopLM server; keep one for the whole process and close it at its end. */
export class Client {
  constructor(address?: string, options?: ClientOptions);
  recommend(request: RecommendRequest): Promise<Recommendations>;
  rank(request: RankRequest): Promise<Ranking>;
  predict(request: PredictRequest): Promise<Predictions>;
  getModel(options?: CallOptions): Promise<ModelInfo>;
  chat(messages: string | Message[], options?: ChatOptions): ChatStream;
  /** Rejects with UnavailableError where no server accepts a connection in time. */
  waitUntilReady(timeoutMs?: number): Promise<void>;
  close(): void;
}

export interface FieldViolation {
  /** Path of the field, such as `customer.events[3].time`. */
  field: string;
  description: string;
}

export interface ErrorFields {
  /** gRPC status code. */
  code: number;
  /** Stable UPPER_SNAKE code. */
  reason: string;
  requestId: string;
  retrySeconds?: number;
  violations: FieldViolation[];
  cause?: unknown;
}

export class ShopLMError extends Error implements ErrorFields {
  constructor(message: string, fields?: Partial<ErrorFields>);
  readonly code: number;
  readonly reason: string;
  readonly requestId: string;
  readonly retrySeconds?: number;
  readonly violations: FieldViolation[];
}
export class InvalidArgumentError extends ShopLMError {}
export class UnauthenticatedError extends ShopLMError {}
export class PermissionDeniedError extends ShopLMError {}
export class NotServingError extends ShopLMError {}
export class OverloadedError extends ShopLMError {}
export class UnavailableError extends ShopLMError {}
export class DeadlineExceededError extends ShopLMError {}
export class CancelledError extends ShopLMError {}
export class ServerError extends ShopLMError {}
