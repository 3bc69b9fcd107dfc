// Requests to the API, counters of its answers, and the journal of accepted reservations.

import { check } from 'k6';
import exec from 'k6/execution';
import http from 'k6/http';
import { Counter } from 'k6/metrics';
import { API_URL } from './settings.js';

const failures = new Counter('answers_5xx');
const silences = new Counter('answers_none');

// A refusal is an expected answer, so k6 must not count a 4xx as a failed request.
http.setResponseCallback(http.expectedStatuses({ min: 200, max: 499 }));

/** Set if the API expects tokens. TOKEN_URL?sub=userId answers with the token of a buyer. */
export const TOKEN_URL = __ENV.TOKEN_URL;
let buyer = '';
/** Headers that name the buyer of this VU, if the API expects tokens. */
let identity = {};

/** Return the headers that name a buyer. Gets a token, unless it is the same buyer as before. */
export function identityOf(userId) {
  if (!TOKEN_URL || userId === buyer) return identity;
  const url = `${TOKEN_URL}?sub=${encodeURIComponent(userId)}`;
  const response = http.get(url, { tags: { name: 'token' } });
  if (response.status !== 200) exec.test.abort(`GET ${url} returned status ${response.status}`);
  buyer = userId;
  identity = { Authorization: `Bearer ${response.body}` };
  return identity;
}

/** Build one POST /reserve for http.post or http.batch. */
export function reserveRequest(userId, itemId, quantity, key) {
  const headers = { 'Content-Type': 'application/json', ...identityOf(userId) };
  if (key) headers['Idempotency-Key'] = key;
  return {
    method: 'POST',
    url: `${API_URL}/reserve`,
    body: JSON.stringify({ userId, itemId, quantity }),
    params: { headers, tags: { name: 'reserve' } },
  };
}

/** Send one POST /reserve. `outcomeOf` classifies the response. */
export function reserve(userId, itemId, quantity = 1, key = '') {
  const { url, body, params } = reserveRequest(userId, itemId, quantity, key);
  return http.post(url, body, params);
}

/** Send a GET as the buyer of the last request. */
export function get(path, name) {
  return http.get(`${API_URL}${path}`, { headers: identity, tags: { name } });
}

/**
 * Return `accepted`, `no-answer` or the result of `kindOf`. Counts 5xx answers and missing answers.
 */
export function outcomeOf(response) {
  let outcome;
  if (response.status === 0) {
    silences.add(1);
    outcome = 'no-answer';
  } else if (response.status === 202) {
    outcome = 'accepted';
  } else {
    if (response.status >= 500) failures.add(1);
    outcome = kindOf(response);
  }
  return outcome;
}

/** Return the last part of the problem's type, or `status-N` if the response is not a problem. */
export function kindOf(response) {
  const type = String(response.headers['Content-Type']);
  if (!type.startsWith('application/problem+json')) return `status-${response.status}`;
  return response.json('type').split(':').pop();
}

/**
 * Print an accepted reservation as a JSON line. The journal of all lines can be checked against the
 * ledger after the run.
 */
export function journal(response, key = '') {
  const { reservationId, userId, itemId } = response.json();
  console.log(JSON.stringify({ reservationId, userId, itemId, key }));
}

/** Check that a 202 matches its request. */
export function checkAccepted(response, userId, itemId, quantity) {
  const got = response.json();
  check(response, {
    'a 202 matches its request': () =>
      got.userId === userId && got.itemId === itemId && got.quantity === quantity,
    'a 202 has the Location of its reservation': () =>
      response.headers.Location === `/sales/${itemId}/reservations/${got.reservationId}`,
  });
}

/** Return the sale. Aborts the run if it does not exist or does not have `available` units. */
export function freshSale(itemId, available) {
  const response = get(`/sales/${itemId}`, 'sale');
  if (response.status === 0) {
    exec.test.abort(`GET /sales/${itemId} had no answer: set API_URL, which is ${API_URL} now`);
  }
  if (response.status !== 200) {
    exec.test.abort(
      `GET /sales/${itemId} returned status ${response.status}: apply the sale first`,
    );
  }
  const sale = response.json();
  if (sale.available !== available) {
    exec.test.abort(
      `${itemId} has ${sale.available} units available, but STOCK is ${available}: ` +
        `apply a new sale or set STOCK=${sale.available}`,
    );
  }
  return sale;
}
