//! Keys and tokens made by another implementation (the Python package cryptography). The tokens are
//! for alice, until 2100.

pub const RSA_PEM: &str = "\
-----BEGIN PUBLIC KEY-----\n\
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAvOz9Qo3MIwEMEDrDDLXi\n\
FllQWIfOeEUk/Pr+D/9Z+0WRHjYSE9xwMhXkZG83b1zNXiw/e+1gEcy52b8MLSMI\n\
e96siVlFVLlCQTvCQlUBCxabezXxKXETBJRTdDVGeTs3j3bpdG6Ui3AXBR6xBdHP\n\
WqUHbICfPSeypCJo8AEcQPhm57cBfBk6CO7/K1dwrLi8LEUYh45EeljacdUQlTBc\n\
FZXOmEJTN1Vnmj0cD3BZzYe3xIKpqgojl2VfLciOtswL9AJhYWqWsSgZXlFDx5m0\n\
ALZ+EqN7Bj5rt6NGCcaTXsgMa9RYfPNZLWraxgJUhD18iNKMsQzrdncLZekM8oTJ\n\
AQIDAQAB\n\
-----END PUBLIC KEY-----\n\
";
pub const RSA_PKCS1_PEM: &str = "\
-----BEGIN RSA PUBLIC KEY-----\n\
MIIBCgKCAQEAvOz9Qo3MIwEMEDrDDLXiFllQWIfOeEUk/Pr+D/9Z+0WRHjYSE9xw\n\
MhXkZG83b1zNXiw/e+1gEcy52b8MLSMIe96siVlFVLlCQTvCQlUBCxabezXxKXET\n\
BJRTdDVGeTs3j3bpdG6Ui3AXBR6xBdHPWqUHbICfPSeypCJo8AEcQPhm57cBfBk6\n\
CO7/K1dwrLi8LEUYh45EeljacdUQlTBcFZXOmEJTN1Vnmj0cD3BZzYe3xIKpqgoj\n\
l2VfLciOtswL9AJhYWqWsSgZXlFDx5m0ALZ+EqN7Bj5rt6NGCcaTXsgMa9RYfPNZ\n\
LWraxgJUhD18iNKMsQzrdncLZekM8oTJAQIDAQAB\n\
-----END RSA PUBLIC KEY-----\n\
";
pub const RS256: &str = "\
eyJhbGciOiAiUlMyNTYiLCAidHlwIjogIkpXVCIsICJraWQiOiAiazEifQ.eyJzdWIiOiAiYWxpY2UiLCAiZXhwIjogNDEwMjQ0NDgwMCwgImNoYW5uZWxzIjogWyJuZXdzIiwgInRlYW0uKiJdLCAiaXNzIjogInNvbWVvbmUifQ.abMocLU2K7kkbkmAihC1dn6J8k_2V0rfvuUgvvvODYLZ42THrGYGI2RzcMQZUzkwJwNtbClSAi4yVGPJ7fi5YxatgPvb3tFjVtCyDcLKMKxtgnzq3CIeu_007otW_nu0Y6FBp9PblTw16AK6a1EKpY5vGbNfCancRMkgRI_McIhhyTeSD3v4K7Jv2XjThay2-QhvRJ9cam44xCt8y_42CcqYd2leBZNBOcmh6Jr-t8dm9spu9ezOUHCj8wBe30a2v6dS9PTT-KAzuGusSTRZk0HWCBID3h5YU81-lnLyN1koxE9Pg_tJbBoeVI4kW4o5yqCChGCHgwCYBth9l2lddg";
pub const RSA_SHORT_PEM: &str = "\
-----BEGIN PUBLIC KEY-----\n\
MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQC3NeaxciTgJN/b98AyVtsvNDq2\n\
/Gh8or8126iO28NA6efGK5PKs5q9cviVlnPwAW7t7rmtWUAeCGV2yIOAPEaJrsgk\n\
F89cKcuyZDWrXZsOcnWbVbT9z6kT1Dz+WuELA8vHFZoj8vptie0/0BPuxyeIbuwj\n\
oEwwAyCSG8zXxdAIzQIDAQAB\n\
-----END PUBLIC KEY-----\n\
";
pub const P256_PEM: &str = "\
-----BEGIN PUBLIC KEY-----\n\
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEznne5LHzL9ZgSgbJwOYfKq6Sc9y3\n\
GHdscW3UDsnO4ZyshAwUHpU8QLIo2qj7hXvuA7u8g64Cdo3eZRWlqnHzTQ==\n\
-----END PUBLIC KEY-----\n\
";
pub const ES256: &str = "\
eyJhbGciOiAiRVMyNTYiLCAidHlwIjogIkpXVCIsICJraWQiOiAiazEifQ.eyJzdWIiOiAiYWxpY2UiLCAiZXhwIjogNDEwMjQ0NDgwMCwgImNoYW5uZWxzIjogWyJuZXdzIiwgInRlYW0uKiJdLCAiaXNzIjogInNvbWVvbmUifQ.-XM10nu1uU_SqN7wR_8owF2Ru8R1kzaa2WvVsmzpZ9S3ts2PWOpBszJFMdduKrS-tJRNt43-mSsXLeqzy-JXOA";
pub const P384_PEM: &str = "\
-----BEGIN PUBLIC KEY-----\n\
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEotudvJAIYuC0/qvlsU8yDv97YrNXEjQr\n\
ENT4f5BhE6CVqVC1JFYqT4nS58cGnXl3YR/T5tySyiHATom/DZSkewcWkxnOHm9t\n\
41C0jUs/hodcEPLzIpjMuhIDto/5DFKA\n\
-----END PUBLIC KEY-----\n\
";
pub const ED25519_PEM: &str = "\
-----BEGIN PUBLIC KEY-----\n\
MCowBQYDK2VwAyEAzKBldKVdR1GhP/DyAYJI9f7Ihp1C0eS0wKmzt/C0uIs=\n\
-----END PUBLIC KEY-----\n\
";
pub const EDDSA: &str = "\
eyJhbGciOiAiRWREU0EiLCAidHlwIjogIkpXVCIsICJraWQiOiAiazEifQ.eyJzdWIiOiAiYWxpY2UiLCAiZXhwIjogNDEwMjQ0NDgwMCwgImNoYW5uZWxzIjogWyJuZXdzIiwgInRlYW0uKiJdLCAiaXNzIjogInNvbWVvbmUifQ.oJro61GWNxtDi4PuNxX33AcOho-VjAZH5b94Agrz0jScUmXakfAgNeuUc1t-b5YEe3S77RVUF-Cb6UaSsqfmBA";
