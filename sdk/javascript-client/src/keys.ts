/** The private key of a user: read from PEM text, it signs a server's challenge with the platform's own cryptography. */

import { ConfigError } from "./errors.js";

type Algorithm = { import: EcKeyImportParams | RsaHashedImportParams | { name: "Ed25519" }; sign: AlgorithmIdentifier | EcdsaParams };

// The encoded object identifiers by which a PKCS #8 file says what it holds.
const ALGORITHMS: readonly (readonly [string, Algorithm])[] = [
  ["06032b6570", { import: { name: "Ed25519" }, sign: { name: "Ed25519" } }],
  ["06082a8648ce3d030107", ecdsa("P-256", "SHA-256")],
  ["06052b81040022", ecdsa("P-384", "SHA-384")],
  [
    "06092a864886f70d010101",
    { import: { name: "RSASSA-PKCS1-v1_5", hash: "SHA-256" }, sign: { name: "RSASSA-PKCS1-v1_5" } },
  ],
];

function ecdsa(namedCurve: string, hash: string): Algorithm {
  return { import: { name: "ECDSA", namedCurve }, sign: { name: "ECDSA", hash } };
}

export class PrivateKey {
  readonly #key: CryptoKey;
  readonly #algorithm: Algorithm;

  private constructor(key: CryptoKey, algorithm: Algorithm) {
    this.#key = key;
    this.#algorithm = algorithm;
  }

  /** Of the text of a PKCS #8 file: `-----BEGIN PRIVATE KEY-----`. Rejects with ConfigError. */
  static async parse(pem: string): Promise<PrivateKey> {
    const body = /-----BEGIN PRIVATE KEY-----([\sA-Za-z0-9+/=]+)-----END PRIVATE KEY-----/.exec(pem)?.[1];
    if (body === undefined) {
      throw new ConfigError(
        "expected a private key in PKCS #8 (BEGIN PRIVATE KEY); `ssh-keygen -p -m PKCS8 -f FILE` rewrites another one",
      );
    }
    const der = Uint8Array.from(atob(body.replace(/\s/g, "")), (letter) => letter.charCodeAt(0));
    const head = hex(der.subarray(0, 40));
    const algorithm = ALGORITHMS.find(([identifier]) => head.includes(identifier))?.[1];
    if (algorithm === undefined) {
      throw new ConfigError("this kind of key is not taken; expected Ed25519, ECDSA (P-256, P-384) or RSA");
    }
    const key = await crypto.subtle.importKey("pkcs8", der, algorithm.import, false, ["sign"]);
    return new PrivateKey(key, algorithm);
  }

  async sign(challenge: Uint8Array<ArrayBuffer>): Promise<Uint8Array> {
    const signature = new Uint8Array(await crypto.subtle.sign(this.#algorithm.sign, this.#key, challenge));
    return this.#algorithm.import.name === "ECDSA" ? asDer(signature) : signature;
  }
}

/** The two numbers of an ECDSA signature, which come side by side, in the encoding that servers expect. */
function asDer(signature: Uint8Array): Uint8Array {
  const half = signature.length / 2;
  const numbers = [signature.subarray(0, half), signature.subarray(half)].flatMap(integer);
  return Uint8Array.from([0x30, numbers.length, ...numbers]); // under 128 bytes for the curves that are taken
}

function integer(bytes: Uint8Array): number[] {
  const first = bytes.findIndex((byte) => byte !== 0);
  const digits = [...bytes.subarray(first < 0 ? bytes.length - 1 : first)];
  const positive = (digits[0] ?? 0) >= 0x80 ? [0, ...digits] : digits;
  return [0x02, positive.length, ...positive];
}

function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
