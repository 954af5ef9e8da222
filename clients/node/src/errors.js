/**
 * Every error that a call can reject with.
 *
 *     ShopLMError
 *     ├── InvalidArgumentError   a field of the request is wrong; `violations` names it  INVALID_ARGUMENT
 *     ├── UnauthenticatedError   no token, or a wrong one                                UNAUTHENTICATED
 *     ├── PermissionDeniedError  the token does not allow this                           PERMISSION_DENIED
 *     ├── NotServingError        this server does not offer the service                  UNIMPLEMENTED, FAILED_PRECONDITION
 *     ├── OverloadedError        refused for now; try again after `retrySeconds`         RESOURCE_EXHAUSTED
 *     ├── UnavailableError       no server there, or it is starting or draining          UNAVAILABLE
 *     ├── DeadlineExceededError  no answer within the timeout                            DEADLINE_EXCEEDED
 *     ├── CancelledError         the call was cancelled                                  CANCELLED
 *     └── ServerError            anything else: a fault of the server                    INTERNAL, UNKNOWN, ...
 *
 * Arguments that cannot be sent at all throw TypeError or RangeError before anything goes over the wire.
 */
import { status } from '@grpc/grpc-js';
import protobuf from 'protobufjs';

/** A call that failed: gRPC `code`, stable `reason`, `retrySeconds` where the server says, `violations`, `requestId`. */
export class ShopLMError extends Error {
  /**
   * @param {string} message
   * @param {Partial<import('./index.js').ErrorFields>} [fields]
   */
  constructor(message, fields = {}) {
    super(message, { cause: fields.cause });
    this.name = new.target.name;
    this.code = fields.code ?? status.UNKNOWN;
    this.reason = fields.reason ?? '';
    this.requestId = fields.requestId ?? '';
    this.retrySeconds = fields.retrySeconds;
    this.violations = fields.violations ?? [];
  }
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

const BY_CODE = new Map([
  [status.INVALID_ARGUMENT, InvalidArgumentError],
  [status.OUT_OF_RANGE, InvalidArgumentError],
  [status.UNAUTHENTICATED, UnauthenticatedError],
  [status.PERMISSION_DENIED, PermissionDeniedError],
  [status.UNIMPLEMENTED, NotServingError],
  [status.FAILED_PRECONDITION, NotServingError],
  [status.RESOURCE_EXHAUSTED, OverloadedError],
  [status.UNAVAILABLE, UnavailableError],
  [status.DEADLINE_EXCEEDED, DeadlineExceededError],
  [status.CANCELLED, CancelledError],
]);

// The messages of google.rpc that a status carries, as far as they are read here.
const rpc = protobuf.parse(`
  syntax = "proto3";
  package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
  message RetryInfo { Duration retry_delay = 1; }
  message ErrorInfo { string reason = 1; string domain = 2; }
  message BadRequest {
    message FieldViolation { string field = 1; string description = 2; }
    repeated FieldViolation field_violations = 1;
  }
`).root;

/** Details of a status; bytes that cannot be read give none, because the status itself still counts. */
function readDetails(metadata) {
  const fields = { violations: [] };
  const [packed] = metadata?.get('grpc-status-details-bin') ?? [];
  if (packed === undefined) return fields;
  try {
    for (const detail of rpc.lookupType('google.rpc.Status').decode(packed).details) {
      const name = detail.typeUrl.split('/').at(-1);
      if (!['google.rpc.BadRequest', 'google.rpc.RetryInfo', 'google.rpc.ErrorInfo'].includes(name)) continue;
      const message = rpc.lookupType(name).decode(detail.value);
      if (name === 'google.rpc.BadRequest') {
        fields.violations.push(...message.fieldViolations.map(({ field, description }) => ({ field, description })));
      } else if (name === 'google.rpc.RetryInfo') {
        fields.retrySeconds = Number(message.retryDelay?.seconds ?? 0) + (message.retryDelay?.nanos ?? 0) * 1e-9;
      } else {
        fields.reason = message.reason;
      }
    }
  } catch {
    return fields;
  }
  return fields;
}

/**
 * The error that stands for what grpc-js reported; anything that is not a gRPC status is returned as it is.
 * @param {any} error
 * @param {string} requestId
 */
export function errorFromRpc(error, requestId) {
  if (!(error instanceof Error) || typeof (/** @type {any} */ (error).code) !== 'number') return error;
  const { code, details, metadata } = /** @type {any} */ (error);
  const kind = BY_CODE.get(code) ?? ServerError;
  return new kind(details || status[code] || error.message, { code, requestId, cause: error, ...readDetails(metadata) });
}
